"""A whitened convolution as one differentiable operation.

rows of x -> moments -> inverse root -> fold -> convolution, and the way back by hand. Written as separate operations,
autograd would keep the unfolded input alive until the backward pass, and make a dense, mostly zero gradient of the
whole input for the few sampled windows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_deconv.linalg import full_precision

from .conv_map import ConvMap, Gradients
from .partition import Partition, spread_shift
from .statistics import Statistics, add_statistics_gradient_
from .whitening import (
    apply_whitener,
    apply_whitener_backward,
    fold_bias,
    fold_weight,
    fold_weight_backward,
    subtract_shift_gradient_,
    sum_weight,
)

__all__ = ["whitened_conv"]


def whitened_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_map: ConvMap,
    statistics: Statistics,
    frozen: Tensor | None = None,
    name: str = "a whitened convolution",
) -> Tensor:
    """The convolution of whitened windows of x.

    Args:
        x: (N, C, H, W).
        weight, bias: of the convolution; no bias counts as zeros.
        conv_map: its geometry, and how its input is sampled and divided into blocks.
        statistics: what to whiten with: those of x, by `batch_statistics`.
        frozen: a boolean scalar; where it is true, the statistics are not those of x.
        name: of the layer, for errors.

    Returns:
        the output. Gradients flow to x (through its statistics too, unless frozen), weight and bias.

    Raises:
        RuntimeError: in a backward pass through these gradients, which are written by hand.
    """
    mean, whitener = statistics.mean, statistics.whitener
    output: Tensor = _WhitenedConv.apply(x, weight, bias, conv_map, frozen, name, mean, whitener, *statistics.iterates)
    return output


class _WhitenedConv(torch.autograd.Function):
    """Whitening is applied to the weight, w D and b - w D mu, or, the same function, to the input, (x D) w.

    `met` is the weight that meets the input, `shift` what it multiplies in the bias: mu or D mu. For the backward pass
    D is applied again: of the input no copy is kept, of the folded weight its sum over the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_map: ConvMap,
        frozen: Tensor | None,
        name: str,
        mean: Tensor,
        whitener: Tensor,
        *iterates: Tensor,
    ) -> Tensor:
        partition, dtype = conv_map.partition, _conv_dtype(x)
        input, met, shift = x.to(dtype), weight.to(whitener.dtype), mean.unsqueeze(-2)
        with full_precision(x):
            if whitens_input(x, weight, partition):
                input, shift = apply_whitener(input, whitener), torch.bmm(shift, whitener.mT)
            else:
                met = fold_weight(met, whitener, partition)
            sums = sum_weight(met, partition)
            output = conv_map(input, met.to(dtype), fold_bias(bias, sums, shift, partition).to(dtype))
        ctx.save_for_backward(x, weight, mean, shift, whitener, sums, frozen, *iterates)
        ctx.conv_map, ctx.has_bias, ctx.dtype, ctx.name = conv_map, bias is not None, dtype, name
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keeps_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            grads = _WhitenedConv._gradients(ctx, grad)
        if keeps_graph:  # by create_graph=True, whether the incoming gradient requires one or not
            grads = _OnlyOnce.apply(ctx.name, *(g if g is None else g.requires_grad_() for g in grads))
        return *grads, *[None] * (len(ctx.needs_input_grad) - 3)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, each None where it is not asked for."""
        saved = ctx.saved_tensors
        fixed, iterates = _Saved(*saved[: len(_Saved._fields)]), saved[len(_Saved._fields) :]
        with full_precision(fixed.x):
            grads = _convolution_gradients(ctx.conv_map, fixed, grad.to(ctx.dtype), ctx.needs_input_grad[0])
            grad_x, grad_weight, grad_bias, grad_mean, grad_whitener = grads
            if grad_x is not None:
                if fixed.frozen is not None:
                    grad_mean, grad_whitener = (g.masked_fill(fixed.frozen, 0) for g in (grad_mean, grad_whitener))
                add_statistics_gradient_(
                    grad_x, fixed.x, ctx.conv_map, fixed.mean, fixed.whitener, iterates, grad_mean, grad_whitener
                )
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None


class _OnlyOnce(torch.autograd.Function):
    """Gradients as they are, which nothing can be derived from: autograd would take them for constants."""

    @staticmethod
    def forward(ctx: Any, name: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"a second derivative of {ctx.name} in training: its gradients are written by hand and cannot be derived"
            " again; take it in evaluation (model.eval()) or with frozen statistics (timm_deconv.freeze)"
        )


class _Saved(NamedTuple):
    """What the forward pass keeps, before the iterates of the root."""

    x: Tensor
    weight: Tensor
    mean: Tensor
    shift: Tensor
    whitener: Tensor
    sums: Tensor
    frozen: Tensor | None


def _convolution_gradients(
    conv_map: ConvMap, saved: _Saved, grad: Tensor, with_x: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x as if its statistics were constants (None unless `with_x`), weight, bias, mean and whitener."""
    x, weight, mean, shift, whitener, sums, _ = saved
    partition = conv_map.partition
    input, wide = x.to(grad.dtype), weight.to(whitener.dtype)
    grad_x, grad_met, grad_bias = _plain_gradients(conv_map, grad, input, wide, whitener, with_x)
    grad_met = grad_met.to(whitener.dtype)
    grad_outputs = spread_shift(grad_bias.to(whitener.dtype), partition)
    grad_mean = torch.bmm(grad_outputs.unsqueeze(-2), sums).neg()
    if not whitens_input(x, weight, partition):
        grad_weight, grad_whitener = fold_weight_backward(grad_met, grad_outputs, shift, wide, whitener, partition)
    else:
        grad_weight = subtract_shift_gradient_(grad_met, grad_outputs, shift, partition)
        grad_whitener = torch.bmm(grad_mean.mT, mean.unsqueeze(-2))
        if grad_x is not None:
            grad_x, of_products = apply_whitener_backward(grad_x, input, whitener)
            grad_whitener += of_products
        grad_mean = torch.bmm(grad_mean, whitener)
    grad_x = None if grad_x is None else grad_x.to(x.dtype)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_mean, grad_whitener


def _plain_gradients(
    conv_map: ConvMap, grad: Tensor, input: Tensor, weight: Tensor, whitener: Tensor, with_x: bool
) -> Gradients:
    """Of what is convolved in the end, x or x D, and w D or w; neither product outlives the call."""
    if whitens_input(input, weight, conv_map.partition):
        input = apply_whitener(input, whitener)
    elif with_x:
        weight = fold_weight(weight, whitener, conv_map.partition)
    return conv_map.backward(grad, input, weight.to(grad.dtype), with_x)


def whitens_input(x: Tensor, weight: Tensor, partition: Partition) -> bool:
    """Whether D is applied to x and not to the weight, the same function: where that is fewer products.

    F products an element either way, 4 times: in the forward and the backward pass, and for the gradients of both.
    """
    return partition.one_whitener and x.numel() < weight.numel()


def _conv_dtype(x: Tensor) -> torch.dtype:
    """What the convolution itself computes in."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
