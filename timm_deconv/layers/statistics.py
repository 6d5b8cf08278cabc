"""Mean and whitener of a batch, and the way back to it by hand.

Rows are gathered again in the backward pass, so that nothing of the size of an unfolded input is kept, and their
gradient lands in place in that of the input.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_deconv.errors import InputError
from timm_deconv.linalg import (
    covariance,
    full_precision,
    isqrt_backward,
    isqrt_of_rows,
    isqrt_with_iterates,
    promote,
)
from timm_deconv.products import rows_times

from .config import DeconvCfg
from .conv_map import ConvMap
from .gain import PROBED_ROWS, probe
from .partition import split_rows, unsplit_rows
from .whitening import (
    LEAST_VARIANCE,
    count_padding,
    count_padding_backward,
    differ,
    regularise,
    regularise_backward,
    varies,
    whitener,
)

__all__ = ["Statistics", "add_statistics_gradient_", "batch_statistics", "check_rows", "vector_statistics"]


class Statistics(NamedTuple):
    """Mean and whitener of a batch, and what running averages and the way back need.

    Attributes:
        mean: (S, F). whitener: (S, F, F), zero for a set that does not vary.
        varies: bool (S,), see `varies`.
        samples: R, the rows.
        deviations: (S, at most PROBED_ROWS, F), some rows less the mean, without gradient, samples or not; None if
            nothing asks for them.
        iterates: what the way back through the root needs beside the whitener.
    """

    mean: Tensor
    whitener: Tensor
    varies: Tensor
    samples: int
    deviations: Tensor | None
    iterates: tuple[Tensor, ...] = ()


@torch.no_grad()
def batch_statistics(x: Tensor, conv_map: ConvMap) -> Statistics:
    """Statistics of the windows that a convolution sees in x, without gradient; see `add_statistics_gradient_`."""
    with full_precision(x):
        rows, _ = _rows(x, conv_map)
        cfg, samples = conv_map.cfg, rows.shape[-2]
        mean, cov = covariance(rows, overwrite=conv_map.copies)
        deviations = _probe(x, rows, mean, conv_map) if cfg.gain_corrected else None
        mean, cov = count_padding(mean, cov, conv_map.padding_share(x))
        # one row has no deviation, but those that were passed over may differ from it
        varying = varies(cov, cfg.eps) if samples > 1 else differ(x, cfg.eps).expand(cov.shape[0])
        root, iterates = isqrt_with_iterates(regularise(cov, samples, cfg), cfg.n_iter, cfg.quartic)
        return Statistics(mean, root * varying[:, None, None], varying, samples, deviations, tuple(iterates))


def vector_statistics(rows: Tensor, cfg: DeconvCfg) -> Statistics:
    """Statistics of rows (S, R, F) that are all the samples there are; differentiable by autograd.

    Of at most half as many rows as features no covariance is made, unless it were to be shrunk.
    """
    rows, (samples, features) = promote(rows), rows.shape[-2:]
    if 2 * samples > features or samples < cfg.min_rows * features:
        mean, cov = covariance(rows)
        varying, root = varies(cov, cfg.eps), whitener(cov, samples, cfg)
    else:
        mean = rows.mean(-2)
        deviations = rows - mean.unsqueeze(-2)
        varying = deviations.detach().square().mean((1, 2)) > LEAST_VARIANCE * cfg.eps
        root = isqrt_of_rows(deviations / samples**0.5, cfg.eps, cfg.n_iter, cfg.quartic)
    probed = probe(rows.detach()) - mean.detach().unsqueeze(1) if cfg.gain_corrected else None
    return Statistics(mean, root * varying[:, None, None], varying, samples, probed)


def add_statistics_gradient_(
    grad_x: Tensor,
    x: Tensor,
    conv_map: ConvMap,
    mean: Tensor,
    whitener: Tensor,
    iterates: Sequence[Tensor],
    grad_mean: Tensor,
    grad_whitener: Tensor,
) -> None:
    """Add to the gradient of x what reaches it through its statistics.

    Args:
        grad_x: (N, C, H, W), changed in place.
        x: the input that `batch_statistics` took mean, whitener and iterates from.
        conv_map: geometry and sampling.
        mean: (S, F). whitener: (S, F, F). iterates: see `Statistics`.
        grad_mean: (S, 1, F). grad_whitener: (S, F, F).
    """
    rows, shape = _rows(x, conv_map)
    samples = rows.shape[-2]
    cfg = conv_map.cfg
    grad_cov = isqrt_backward(grad_whitener, whitener, list(iterates), cfg.n_iter, cfg.quartic)
    grad_cov = regularise_backward(grad_cov, samples, cfg)
    share = conv_map.padding_share(x)
    mean, grad_mean, grad_cov = count_padding_backward(mean.unsqueeze(-2), grad_mean, grad_cov, share)
    rows = rows.sub_(mean) if conv_map.copies else rows - mean
    grad_rows = _times_symmetric(rows, grad_cov, grad_mean / samples, 2 / samples)
    conv_map.add_columns_(grad_x, unsplit_rows(grad_rows, shape, conv_map.partition).to(grad_x.dtype))


def _probe(x: Tensor, rows: Tensor, mean: Tensor, conv_map: ConvMap) -> Tensor:
    """Deviations of some rows that the convolution sees, whether they are samples or not.

    A whitener fits its own samples better than what lies between them, and the output is made of both. Windows are
    taken from the samples all the same, `rows`, which `covariance` has centred: there are many more than features.
    """
    columns = conv_map.other_columns(x, PROBED_ROWS)
    if columns is None:
        return probe(rows).contiguous()  # so that it does not keep all rows alive
    return probe(promote(split_rows(columns, conv_map.partition))) - mean.unsqueeze(1)


def check_rows(rows: int, name: str, input: Tensor) -> None:
    """Raise InputError for one row: it has no deviation from its own mean, and only the bias would learn."""
    if rows == 1:
        raise InputError(
            f"{name.strip()} has one row to whiten in training, from an input of {tuple(input.shape)}: nothing would be"
            " learnt; give larger batches or images, or freeze the statistics (timm_deconv.freeze)"
        )


def _rows(x: Tensor, conv_map: ConvMap) -> tuple[Tensor, list[int]]:
    """Rows (S, R, F) in float32 or better, and the shape of the columns that they are made of."""
    columns = conv_map.columns(x)
    return promote(split_rows(columns, conv_map.partition)), list(columns.shape)


def _times_symmetric(rows: Tensor, matrices: Tensor, constant: Tensor, scale: float) -> Tensor:
    """scale rows M + constant of rows (S, R, F), symmetric M (S, F, F) and constant (S, 1, F), in the rows' layout."""
    if rows.is_contiguous() or rows.shape[-1] == 1:
        return rows_times(rows, scale * matrices, constant, symmetric=True)
    return torch.baddbmm(constant.mT, matrices, rows.mT, alpha=scale).mT
