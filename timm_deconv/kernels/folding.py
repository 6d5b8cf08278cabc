"""Whitening folded into weight and bias of the plain layer that does the work, and the gradients of all that went in.

conv(D (x - mu)) = conv'(x) with weight w D and bias b - w D mu (Ye et al., Network Deconvolution, ICLR 2020, algorithm
1). Blocks of pixels of one group are runs of channels of the weight, which `apply_whitener` multiplies.
"""

from typing import Any

import torch
from torch import Tensor

from timm_deconv.linalg import full_precision

from .application import apply_whitener, apply_whitener_backward
from .blocks import Blocks, merge_weight, split_weight, spread_over_window, sum_over_window
from .formats import in_format, is_channels_last, memory_format
from .onednn import inner_products, rows_times
from .operation import Operation

__all__ = ["fold", "fold_whitening", "fold_whitening_backward", "shift_bias", "shift_bias_backward_"]


def fold(weight: Tensor, bias: Tensor | None, mean: Tensor, whitener: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Fold whitening into weight w D and bias b - w D mu by operations that can be derived twice.

    TorchScript and exporters take it.

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


def _fold_whitening(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    whitener: Tensor,
    blocks: Blocks,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Fold whitening into weight w D and bias b - w D mu, R F^2 products for R rows of the weight.

    Args:
        weight: (O, C / groups, height, width).
        bias: (O,); None counts as zeros.
        mean: (S, F). whitener: (S, F, F); it is computed in their dtype.
        blocks: which features meet which whitener.
        dtype, channels_last: dtype and memory format of what is returned.

    Returns:
        weight and bias, of the shapes of those given.
    """
    with full_precision(weight):
        folded = _weight_times(weight.to(whitener.dtype), whitener, blocks)
        folded_bias = shift_bias(bias, folded, mean, blocks)
        return in_format(folded.to(dtype), channels_last), folded_bias.to(dtype)


def _fold_whitening_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    whitener: Tensor,
    blocks: Blocks,
    with_statistics: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the gradients of what went into `fold_whitening`, but for the bias: that of the folded one is its.

    With G the gradient of the folded weight less that of the bias times mu^T, they are G D^T of the weight and w^T G of
    the whitener; v D of the mean, with v the sum of the weight's rows times the gradient of the bias, negated.

    Args:
        grad_weight, grad_bias: of what `fold_whitening` gave, in any dtype and format.
        weight, mean, whitener, blocks: what it was given.
        with_statistics: whether the gradients of mean and whitener are asked for.

    Returns:
        the gradient of the weight, in its dtype and memory format, and [that of the mean, of the whitener] or [].
    """
    with full_precision(weight):
        wide, grad_weight, grad_bias = (value.to(whitener.dtype) for value in (weight, grad_weight, grad_bias))
        shift = torch.bmm(mean.unsqueeze(1), whitener.mT).squeeze(1)
        if not with_statistics:
            own = _weight_times(grad_weight, whitener.mT, blocks)
            shift_bias_backward_(own, grad_bias, wide, shift, blocks)
            return in_format(own.to(weight.dtype), is_channels_last(weight)), []
        own, grad_whitener = _weight_times_backward(grad_weight, wide, whitener, blocks)
        grad_shift = shift_bias_backward_(own, grad_bias, wide, shift, blocks)
        grad_mean = torch.bmm(grad_shift.unsqueeze(1), whitener).squeeze(1)
        grad_whitener = torch.baddbmm(grad_whitener, grad_shift.unsqueeze(-1), mean.unsqueeze(1))
        return in_format(own.to(weight.dtype), is_channels_last(weight)), [grad_mean, grad_whitener]


def shift_bias(bias: Tensor | None, weight: Tensor, shift: Tensor, blocks: Blocks) -> Tensor:
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


def shift_bias_backward_(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, shift: Tensor, blocks: Blocks
) -> Tensor:
    """Add to the gradient of the weight, in place, what reaches it through `shift_bias`; return the shift's (S, F).

    Args:
        grad_weight, weight: (O, C, h, w). grad_bias: (O,), of what `shift_bias` gave.
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


def _weight_times(weight: Tensor, matrices: Tensor, blocks: Blocks) -> Tensor:
    """Multiply every row of a weight by its matrix (S, F, F) from the right, in the weight's memory format."""
    if _of_runs(blocks):
        return apply_whitener.function(weight, matrices)
    return _merged(rows_times(split_weight(weight, blocks), matrices), weight, blocks)


def _weight_times_backward(grad: Tensor, weight: Tensor, matrices: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Compute the gradients of weight and matrices from that of `_weight_times`."""
    if _of_runs(blocks):
        return apply_whitener_backward.function(grad, weight, matrices)
    grad_rows, rows = split_weight(grad, blocks), split_weight(weight, blocks)
    return _merged(rows_times(grad_rows, matrices.mT), weight, blocks), inner_products(rows, grad_rows)


def _of_runs(blocks: Blocks) -> bool:
    """Tell whether one matrix multiplies every run of F channels, so that it is the kernel of a 1x1 convolution."""
    return blocks.pixels and blocks.groups == 1


def _merged(rows: Tensor, weight: Tensor, blocks: Blocks) -> Tensor:
    """Merge rows in the shape and memory format of the weight."""
    return in_format(merge_weight(rows, list(weight.shape), blocks), is_channels_last(weight))


def _flat_outputs(values: Tensor, weight: Tensor) -> Tensor:
    """Flatten (n, C, h, w) to (n, C h w) in the order in which the weight is dense in memory."""
    return (values if weight.is_contiguous() else values.permute(0, 2, 3, 1)).flatten(1)


def _unflatten_output(flat: Tensor, weight: Tensor) -> Tensor:
    """Invert `_flat_outputs` for one output: (1, C, h, w)."""
    _, channels, height, width = weight.shape
    if weight.is_contiguous():
        return flat.view(1, channels, height, width)
    return flat.view(1, height, width, channels).permute(0, 3, 1, 2)


def _fake_folding(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    whitener: Tensor,
    blocks: Blocks,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    folded = torch.empty_like(weight, dtype=dtype, memory_format=memory_format(channels_last))
    return folded, weight.new_empty(weight.shape[0], dtype=dtype)


def _fake_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    whitener: Tensor,
    blocks: Blocks,
    with_statistics: bool,
) -> tuple[Tensor, list[Tensor]]:
    own = torch.empty_like(weight, memory_format=memory_format(is_channels_last(weight)))
    return own, [value.new_empty(value.shape) for value in (mean, whitener)] if with_statistics else []


def _plain_folding(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    whitener: Tensor,
    blocks: Blocks,
    dtype: torch.dtype,
    channels_last: bool,
) -> list[Tensor]:
    with full_precision(weight):
        return [value.to(dtype) for value in fold(weight, bias, mean, whitener, blocks)]


def _backward(
    grads: tuple[Tensor, Tensor],
    kept: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    whitener: Tensor,
    blocks: Blocks,
    *_: Any,
) -> list[Tensor]:
    own, of_statistics = fold_whitening_backward(*grads, weight, mean, whitener, blocks, True)
    of_bias = [] if bias is None else [grads[1].to(bias.dtype)]
    return [own, *of_bias, *of_statistics]


fold_whitening = Operation(
    _fold_whitening,
    "(Tensor weight, Tensor? bias, Tensor mean, Tensor whitener, SymInt[] blocks, ScalarType dtype,"
    " bool channels_last) -> (Tensor, Tensor)",
)
fold_whitening.register_fake(_fake_folding)
fold_whitening.register_autograd(_backward, _plain_folding, keep=lambda folded, folded_bias: [])

fold_whitening_backward = Operation(
    _fold_whitening_backward,
    "(Tensor grad_weight, Tensor grad_bias, Tensor weight, Tensor mean, Tensor whitener, SymInt[] blocks,"
    " bool with_statistics) -> (Tensor, Tensor[])",
)
fold_whitening_backward.register_fake(_fake_backward)
