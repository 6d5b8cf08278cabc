"""The gain of the running whitener: how much power it passes on, compared with the live ones.

An average of inverse roots is dominated by the largest of them, and a batch whitens the directions that it has seen
itself better than those of the next. A few per cent too much in a layer are a factor of hundreds behind fifty. So each
batch is a test before it is averaged in: the power that the average of the batches before makes of its deviations,
against the power that its own whitener makes of them. The ratio of the two averages is taken out of the running
whitener, and it tracks weights that move, too.
"""

import torch
from torch import Tensor

from .onednn import rows_times

__all__ = ["LARGEST", "PROBED_ROWS", "first_norm", "gain", "passed_norm", "probe"]

PROBED_ROWS = 128
"""Rows of a batch that the power is measured on, at most."""

EARLY = 16
"""Batches until the exponent of the correction for a lagging average has fallen to 2; it is 3 up to half of them."""

TINY = 1e-12
LARGEST = 1e30
"""Most power that is measured: weights can grow a million times within the first steps, each layer's into the next."""


def probe(deviations: Tensor) -> Tensor:
    """Return some of the rows (S, R, F), evenly spaced: (S, at most PROBED_ROWS, F), a view."""
    return deviations[:, :: -(-deviations.shape[1] // PROBED_ROWS)]


def passed_norm(deviations: Tensor, whitener: Tensor) -> Tensor:
    """Compute the norm (S,) of deviations (S, R, F) times a whitener (S, F, F); its square is R F times the power."""
    return torch.linalg.vector_norm(rows_times(deviations, whitener), dim=(1, 2))


def first_norm(deviations: Tensor, whitener: Tensor, samples: int) -> Tensor:
    """Compute what a first batch's whitener would pass on if the next batch varied alike in all directions: (S,).

    Nothing is known of the next batch yet. A set of less variance than the layer's mean is taken to get that much.

    Args:
        deviations: (S, R, F). whitener: (S, F, F).
        samples: rows that the mean was taken from; the mean of the next batch will differ.

    Returns:
        the norm, as `passed_norm` computes it.
    """
    sets, _, features = deviations.shape
    norm = torch.linalg.vector_norm(deviations, dim=(1, 2))
    norm = torch.maximum(norm, torch.linalg.vector_norm(norm) * sets**-0.5)
    scale = ((samples + 1) / max(samples - 1, 1) / features) ** 0.5
    return norm * torch.linalg.vector_norm(whitener, dim=(1, 2)) * scale


def gain(power: Tensor, latest: Tensor, count: Tensor) -> Tensor:
    """Compute the factor (S,) of the running whitener under which it passes on what the live ones do.

    When the latest batch shows that the average has fallen behind, the factor falls too; the more so among the first
    batches, when weights move fastest. All sets are judged together, as a single one would be noise. As long as there
    are few batches, less is passed on than they say.

    Args:
        power: (2, S), float32 or better, averages of what the running and the live whiteners passed on.
        latest: the same of the latest batch.
        count: (), batches averaged so far, one or more.
    """
    powers, share = torch.stack([power, latest]) + TINY, 1 / count
    averaged, of_latest = powers.sum(-1)
    passed, live = of_latest / averaged
    behind = (passed / live).clamp(min=1) ** (EARLY * share + 1).clamp(max=3)
    excess = powers[0, 0] / powers[0, 1] * behind
    return torch.addcmul(excess, excess, share * share, value=2).rsqrt()
