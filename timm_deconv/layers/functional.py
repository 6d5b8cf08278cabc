"""Whitening as pure functions: moments -> whitener -> weight and bias of a plain layer, and the way back by hand.

Ye et al., Network Deconvolution, ICLR 2020, sections 3 and 4 (algorithm 1): with the mean mu of the input windows and
the approximate inverse root D of their covariance, conv(D (x - mu)) = conv'(x) with weight w D and bias b - w D mu.
Every function that the backward pass needs has its adjoint beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from timm_deconv.errors import InputError
from timm_deconv.kernels import Blocks, inverse_root, inverse_root_backward
from timm_deconv.kernels.blocks import merge_weight, split_weight, spread_over_window, sum_over_window
from timm_deconv.linalg import eye_like, full_precision, shrink

from .config import DeconvCfg

__all__ = [
    "Moments",
    "Statistics",
    "check_rows",
    "estimate",
    "estimate_backward",
    "fold",
    "fold_bias",
    "fold_bias_backward_",
    "zero_constant",
]

LEAST_VARIANCE = 1e-5
"""Part of eps below which a set of features is taken not to vary at all."""


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
        mean: (S, F). whitener: (S, F, F).
        varies: bool (S,), whether a set's features vary at all.
        row_count: R.
        kept: what the way back through the root needs beside the whitener.
        frozen: bool (), or None: where it is true, mean and whitener are not the batch's and pass on no gradient.
    """

    mean: Tensor
    whitener: Tensor
    varies: Tensor
    row_count: int
    kept: list[Tensor]
    frozen: Tensor | None = None


def estimate(moments: Moments, cfg: DeconvCfg) -> Statistics:
    """Estimate mean and whitener from moments, as configured; differentiable, and by hand by `estimate_backward`."""
    with full_precision(moments.cov):
        mean, cov = _count_padding(moments.mean, moments.cov, moments.padding)
    varies = cov.detach().diagonal(dim1=-2, dim2=-1).mean(-1) > LEAST_VARIANCE * cfg.eps
    whitener, kept = inverse_root(_regularise(cov, moments.row_count, cfg), cfg.n_iter, cfg.quartic)
    return Statistics(mean, whitener, varies, moments.row_count, kept)


def estimate_backward(
    grad_mean: Tensor, grad_whitener: Tensor, statistics: Statistics, padding: float, cfg: DeconvCfg
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of the moments (S, F), and the gradients of mean (S, F) and covariance (S, F, F).

    Args:
        grad_mean: (S, F). grad_whitener: (S, F, F); of what `estimate` gave.
        statistics: what it gave.
        padding, cfg: what it was given.
    """
    grad_cov = inverse_root_backward(grad_whitener, statistics.whitener, statistics.kept, cfg.n_iter, cfg.quartic)
    grad_cov = _regularise_backward(grad_cov, statistics.row_count, cfg)
    return _count_padding_backward(statistics.mean, grad_mean, grad_cov, padding)


def zero_constant(statistics: Statistics, x: Tensor, cfg: DeconvCfg) -> Statistics:
    """Zero the whiteners of sets whose rows are all equal.

    There is nothing to whiten there, and only eps would be inverted: deviations stay zero, but each layer would
    multiply gradients by eps ** -0.5. No output changes by more than LEAST_VARIANCE ** 0.5 of a deviation.

    Args:
        statistics: by `estimate`.
        x: the batch (N, C, ...) that they are of; one row has no deviation, but others may differ from it.
        cfg: the layer's.
    """
    varies = statistics.varies
    if statistics.row_count == 1:
        pixel = x.detach()[(slice(1), slice(None), *[slice(1)] * (x.ndim - 2))]
        varies = ((x.detach() - pixel).square().mean() > LEAST_VARIANCE * cfg.eps).expand_as(varies)
    return statistics._replace(whitener=statistics.whitener * varies[:, None, None], varies=varies)


def check_rows(row_count: int, name: str, input: Tensor) -> None:
    """Raise InputError for one row of an input (N, ...): it is its own mean, and only the bias would learn."""
    if row_count == 1:
        raise InputError(
            f"{name} has one row to whiten in training, from an input of {tuple(input.shape)}: nothing would be"
            " learnt; give larger batches or images, or freeze the statistics (timm_deconv.freeze)"
        )


def _count_padding(mean: Tensor, cov: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Compute mean (S, F) and covariance (S, F, F) of pixels of which a share is zero padding, from the image's own."""
    if not share:
        return mean, cov
    cov = torch.baddbmm(cov, mean.unsqueeze(-1), mean.unsqueeze(-2), beta=1 - share, alpha=share * (1 - share))
    return (1 - share) * mean, cov


def _count_padding_backward(
    mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image's own mean (S, F), and its and the covariance's gradients, from what `_count_padding` gave."""
    if not share:
        return mean, grad_mean, grad_cov
    rows, grads = mean.unsqueeze(1), grad_mean.unsqueeze(1)
    grad_mean = torch.baddbmm(grads, rows, grad_cov, beta=1 - share, alpha=2 * share).squeeze(1)
    return mean / (1 - share), grad_mean, (1 - share) * grad_cov


def _regularise(cov: Tensor, row_count: int, cfg: DeconvCfg) -> Tensor:
    """Shrink covariances (S, F, F) where the rows are too few, and add eps to the diagonal."""
    wanted = cfg.min_rows * cov.shape[-1]
    if row_count < wanted:
        cov = shrink(cov, 1 - row_count / wanted)
    return torch.add(cov, eye_like(cov), alpha=cfg.eps)


def _regularise_backward(grad: Tensor, row_count: int, cfg: DeconvCfg) -> Tensor:
    """Return the gradient (S, F, F) of `_regularise`; shrinking is its own adjoint."""
    wanted = cfg.min_rows * grad.shape[-1]
    return shrink(grad, 1 - row_count / wanted) if row_count < wanted else grad


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
