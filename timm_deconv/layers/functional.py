"""Whitening as pure functions: moments -> whitener -> weight and bias of a plain layer, and the way back by hand.

Ye et al., Network Deconvolution, ICLR 2020, sections 3 and 4 (algorithm 1): with the mean mu of the input windows and
the approximate inverse root D of their covariance, conv(D (x - mu)) = conv'(x) with weight w D and bias b - w D mu.
Every function that the backward pass needs has its adjoint beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from timm_deconv.errors import InputError
from timm_deconv.kernels import Blocks, Root, Window, inverse_root
from timm_deconv.kernels.blocks import merge_weight, split_rows, split_weight, spread_over_window, sum_over_window
from timm_deconv.kernels.roots import LEAST_VARIANCE
from timm_deconv.kernels.windows import spread_windows
from timm_deconv.linalg import promote

from .config import DeconvCfg
from .gain import PROBED_ROWS, probe

__all__ = [
    "Moments",
    "Statistics",
    "check_rows",
    "estimate",
    "estimate_live",
    "fold",
    "fold_bias",
    "fold_bias_backward_",
    "root_of",
    "sample_deviations",
]


class Moments(NamedTuple):
    """Mean and covariance of rows.

    Attributes:
        mean: (S, F). cov: (S, F, F), divided by the number of rows.
        row_count: R, how many rows they were taken from.
        padding: the weight of zero padding that is not among the rows.
    """

    mean: Tensor
    cov: Tensor
    row_count: int
    padding: float = 0.0


class Statistics(NamedTuple):
    """Mean and whitener of a batch, and what running averages and the way back need.

    Attributes:
        row_count: R.
        mean: (S, F). whitener: (S, F, F).
        varies: bool (S,), whether a set's features vary at all.
        kept: what the way back through the root needs beside the whitener.
        deviations: (S, at most PROBED_ROWS, F), some rows less the mean, without gradient; None if nothing asks for
            them.
        frozen: bool (), or None: where it is true, mean and whitener are not the batch's and pass on no gradient.
    """

    row_count: int
    mean: Tensor
    whitener: Tensor
    varies: Tensor
    kept: list[Tensor]
    deviations: Tensor | None = None
    frozen: Tensor | None = None


def root_of(cfg: DeconvCfg, zeroes_constant: bool = True) -> Root:
    """Return what a configuration says of the inverse root."""
    return Root(cfg.n_iter, cfg.quartic, cfg.eps, cfg.min_rows, zeroes_constant)


def estimate(moments: Moments, root: Root) -> Statistics:
    """Estimate mean and whitener from moments; differentiable, and by hand by `inverse_root_backward`."""
    mean, cov, row_count, padding = moments
    return Statistics(row_count, *inverse_root(mean, cov, row_count, padding, root))


def estimate_live(moments: Moments, x: Tensor, cfg: DeconvCfg) -> Statistics:
    """Estimate what a batch is whitened with, the whiteners of sets whose rows are all equal being zero.

    Args:
        moments: of the batch.
        x: the batch (N, C, ...); one row has no deviation, but others may differ from it.
        cfg: the layer's.
    """
    statistics = estimate(moments, root_of(cfg))
    if moments.row_count > 1:
        return statistics
    pixel = x.detach()[(slice(1), slice(None), *[slice(1)] * (x.ndim - 2))]
    varies = ((x.detach() - pixel).square().mean() > LEAST_VARIANCE * cfg.eps).expand_as(statistics.varies)
    return statistics._replace(whitener=statistics.whitener * varies[:, None, None], varies=varies)


@torch.no_grad()
def sample_deviations(x: Tensor, window: Window, blocks: Blocks, mean: Tensor) -> Tensor:
    """Return some rows less the mean, evenly spread over the windows of x, samples or not.

    A whitener fits its own samples better than what lies between them, and the output is made of both.

    Args:
        x: (N, C, H, W).
        window, blocks: what the layer sees.
        mean: (S, F).

    Returns:
        (S, at most PROBED_ROWS, F), without gradient.
    """
    rows = split_rows(spread_windows(x, window, PROBED_ROWS), blocks)
    return promote(probe(rows)) - mean.unsqueeze(1)


def check_rows(row_count: int, name: str, input: Tensor) -> None:
    """Raise InputError for one row of an input (N, ...): it is its own mean, and only the bias would learn."""
    if row_count == 1:
        raise InputError(
            f"{name} has one row to whiten in training, from an input of {tuple(input.shape)}: nothing would be"
            " learnt; give larger batches or images, or freeze the statistics (timm_deconv.freeze)"
        )


def fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor, whitener: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Fold whitening into weight w D and bias b - w D mu of the plain layer that does the work (paper, algorithm 1).

    Differentiable; TorchScript and exporters take it.

    Args:
        weight: (O, ...), a convolution's or a linear layer's.
        bias: (O,) or None.
        mean: (S, F) or flattened. whitener: (S, F, F), or (F, F) if S = 1.
        blocks: which features meet which whitener.

    Returns:
        weight and bias of the layer's shapes, in the layer's dtype; computed in the statistics' dtype or better.
    """
    features = blocks.features
    dtype = torch.promote_types(weight.dtype, whitener.dtype)
    rows = split_weight(weight.to(dtype), blocks) @ whitener.to(dtype).reshape(-1, features, features)
    shift = (rows @ mean.to(dtype).reshape(-1, features, 1)).reshape(weight.shape[0], -1).sum(1)
    folded_bias = -shift if bias is None else bias - shift
    folded = merge_weight(rows, list(weight.shape), blocks)
    if weight.is_contiguous():
        folded = folded.reshape(-1).view(weight.shape)  # a 1x1 kernel must not look like one in channels_last
    return folded.to(weight.dtype), folded_bias.to(weight.dtype)


def fold_bias(bias: Tensor | None, weight: Tensor, shift: Tensor, blocks: Blocks) -> Tensor:
    """Subtract from the bias what the weight makes of a shift in every block of its window.

    Args:
        bias: (O,); None counts as zeros.
        weight: (O, C, h, w).
        shift: (S, F). blocks: which of its windows' features it meets.

    Returns:
        (O,).
    """
    window = spread_over_window(shift, list(weight.shape), blocks)
    if blocks.groups > 1:
        products = (weight.unflatten(0, [blocks.groups, -1]) * window.unsqueeze(1)).sum((2, 3, 4)).reshape(-1)
    else:
        products = torch.mv(_flat_outputs(weight, weight), _flat_outputs(window, weight)[0])
    return -products if bias is None else bias - products


def fold_bias_backward_(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, shift: Tensor, blocks: Blocks
) -> Tensor:
    """Add to the gradient of the weight, in place, what reaches it through `fold_bias`; return the shift's (S, F).

    Args:
        grad_weight, weight: (O, C, h, w). grad_bias: (O,), of what `fold_bias` gave.
        shift, blocks: what it was given.
    """
    window = spread_over_window(shift, list(weight.shape), blocks)
    of_outputs = grad_bias.view(blocks.sets, -1, 1, 1, 1)
    grad_weight.unflatten(0, of_outputs.shape[:2]).addcmul_(of_outputs, window.unsqueeze(1), value=-1)
    if blocks.groups > 1:
        grad_window = (weight.unflatten(0, of_outputs.shape[:2]) * of_outputs).sum(1)
    else:
        flat = torch.mv(_flat_outputs(weight, weight).mT, grad_bias)
        grad_window = _unflatten_output(flat, weight)
    return sum_over_window(grad_window, blocks).neg()


def _flat_outputs(values: Tensor, weight: Tensor) -> Tensor:
    """Flatten (n, C, h, w) to (n, C h w) in the order in which the weight is dense in memory."""
    return (values if weight.is_contiguous() else values.permute(0, 2, 3, 1)).flatten(1)


def _unflatten_output(flat: Tensor, weight: Tensor) -> Tensor:
    """Invert `_flat_outputs` for one output: (1, C, h, w)."""
    _, channels, height, width = weight.shape
    if weight.is_contiguous():
        return flat.view(1, channels, height, width)
    return flat.view(1, height, width, channels).permute(0, 3, 1, 2)
