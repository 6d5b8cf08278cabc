"""A whitened convolution as one differentiable operation.

Written as separate operations, autograd would keep the unfolded input alive until the backward pass, and make a dense,
mostly zero gradient of the whole input for the few sampled windows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_deconv.kernels import add_moments_gradient_, apply_whitener, apply_whitener_backward, inverse_root_backward
from timm_deconv.linalg import full_precision

from .config import DeconvCfg
from .functional import Statistics, fold_bias, fold_bias_backward_, root_of
from .geometry import ConvGeometry

__all__ = ["Setting", "convolve", "whitened_conv", "whitens_input"]


def convolve(x: Tensor, weight: Tensor, bias: Tensor, geometry: ConvGeometry) -> Tensor:
    """Convolve x with another weight and bias in a layer's geometry.

    Args:
        x: (N, C, H, W).
        weight: (O, C / groups, h, w). bias: (O,); all of one dtype.
        geometry: the layer's.
    """
    window = geometry.window
    return torch.conv2d(x, weight, bias, window.stride, window.padding, window.dilation, geometry.groups)


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, with_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute the gradients of x (None unless `with_x`), weight and bias from that of `convolve`.

    That of the bias is summed apart: a processor was seen to take 5 ms for it in the convolution's own backward pass,
    and 0.8 ms for the sum.

    Args:
        grad: the shape of the output.
        x, weight, geometry: those of the forward pass.
        with_x: whether the gradient of x is asked for.
    """
    window, needed = geometry.window, [with_x, True, False]
    arguments = (window.stride, window.padding, window.dilation, False, [0, 0], geometry.groups)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, [0], *arguments, needed)
    return grad_x, grad_weight, grad.sum((0, 2, 3))


class Setting(NamedTuple):
    """What a whitened convolution is given beside tensors; `name` is the layer's, for errors."""

    geometry: ConvGeometry
    cfg: DeconvCfg
    name: str


def whitened_conv(x: Tensor, weight: Tensor, bias: Tensor | None, statistics: Statistics, setting: Setting) -> Tensor:
    """Convolve whitened windows of x; gradients flow to x (through its statistics too), weight and bias.

    Args:
        x: (N, C, H, W).
        weight: (O, C / groups, h, w). bias: (O,); None counts as zeros.
        statistics: what to whiten with, estimated from x.
        setting: the layer's geometry for x, configuration and name.

    Returns:
        (N, O, H', W'), in the autocast dtype if there is one.

    Raises:
        RuntimeError: in a backward pass through these gradients, which are written by hand.
    """
    live = statistics
    tensors = (live.mean, live.whitener, live.frozen, *live.kept)
    output: Tensor = _WhitenedConv.apply(x, weight, bias, setting, live.row_count, *tensors)
    return output


class _WhitenedConv(torch.autograd.Function):
    """Whitening is applied to the weight or, the same function, to the input; the bias takes D mu in either way.

    For the backward pass D is applied again: neither a copy of the input nor the folded weight is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        setting: Setting,
        row_count: int,
        mean: Tensor,
        whitener: Tensor,
        frozen: Tensor | None,
        *kept: Tensor,
    ) -> Tensor:
        geometry, dtype = setting.geometry, _conv_dtype(x)
        blocks, wide = geometry.blocks, weight.to(whitener.dtype)
        with full_precision(x):
            shift = torch.bmm(mean.unsqueeze(1), whitener.mT).squeeze(1)
            folded_bias = fold_bias(bias, wide, shift, blocks)
            if whitens_input(x, weight, geometry):
                input, kernel = apply_whitener(x.to(dtype), whitener, blocks), wide
            else:
                input, kernel = x.to(dtype), apply_whitener(wide, whitener, blocks)
            output = convolve(input, kernel.to(dtype), folded_bias.to(dtype), geometry)
        ctx.save_for_backward(x, weight, shift, mean, whitener, frozen, *kept)
        ctx.setting, ctx.row_count, ctx.has_bias, ctx.dtype = setting, row_count, bias is not None, dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keeps_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            grads = _gradients(ctx, grad)
        if keeps_graph:  # by create_graph=True, whether the incoming gradient requires one or not
            grads = _OnlyOnce.apply(ctx.setting.name, *(g if g is None else g.requires_grad_() for g in grads))
        return *grads, *[None] * (len(ctx.needs_input_grad) - 3)


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


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, weight and bias, each None where it is not asked for."""
    x, weight, shift, mean, whitener, frozen, *kept = ctx.saved_tensors
    geometry, cfg, _ = ctx.setting
    blocks, wide = geometry.blocks, weight.to(whitener.dtype)
    with full_precision(x):
        input, grad = x.to(ctx.dtype), grad.to(ctx.dtype)
        grads = _plain_gradients(grad, input, wide, whitener, geometry, ctx.needs_input_grad[0])
        grad_x, grad_weight, grad_bias, grad_whitener = grads
        grad_shift = fold_bias_backward_(grad_weight, grad_bias.to(whitener.dtype), wide, shift, blocks)
        if grad_x is not None:
            grad_x = grad_x.to(x.dtype)
            grad_whitener = torch.baddbmm(grad_whitener, grad_shift.unsqueeze(-1), mean.unsqueeze(1))
            grad_mean = torch.bmm(grad_shift.unsqueeze(1), whitener).squeeze(1)
            if frozen is not None:
                grad_mean, grad_whitener = (g.masked_fill(frozen, 0) for g in (grad_mean, grad_whitener))
            own_mean, *of_moments = inverse_root_backward(
                grad_mean, grad_whitener, mean, whitener, kept, ctx.row_count, geometry.padding, root_of(cfg)
            )
            add_moments_gradient_(grad_x, x, own_mean, *of_moments, geometry.sampling, blocks)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype) if ctx.has_bias else None


def _plain_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, whitener: Tensor, geometry: ConvGeometry, with_x: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Compute the gradients of x (None unless `with_x`), weight, bias and D, as if statistics and bias were constants.

    Args:
        grad: (N, O, H', W'), of the output. x: (N, C, H, W); both in the dtype of the convolution.
        weight: (O, C / groups, h, w). whitener: (S, F, F); both in the dtype of the statistics.
        geometry: the layer's.
        with_x: whether the gradient of x, and with it that of D, is asked for.
    """
    blocks, dtype = geometry.blocks, weight.dtype
    if whitens_input(x, weight, geometry):
        whitened = apply_whitener(x, whitener, blocks)
        grad_x, grad_weight, grad_bias = convolve_backward(grad, whitened, weight.to(x.dtype), geometry, with_x)
        grad_whitener = torch.zeros_like(whitener)
        if grad_x is not None:
            grad_x, grad_whitener = apply_whitener_backward(grad_x, x, whitener, blocks)
        return grad_x, grad_weight.to(dtype), grad_bias, grad_whitener
    kernel = apply_whitener(weight, whitener, blocks) if with_x else weight
    grad_x, grad_kernel, grad_bias = convolve_backward(grad, x, kernel.to(x.dtype), geometry, with_x)
    grad_weight, grad_whitener = apply_whitener_backward(grad_kernel.to(dtype), weight, whitener, blocks)
    return grad_x, grad_weight, grad_bias, grad_whitener


def whitens_input(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Tell whether D is applied to x (N, C, H, W) and not to the weight (O, C, h, w): where that is fewer products.

    F products an element either way, 4 times: in the forward and the backward pass, and for the gradients of both.
    """
    return geometry.blocks.pixels and geometry.groups == 1 and x.numel() < weight.numel()


def _conv_dtype(x: Tensor) -> torch.dtype:
    """Return what the convolution itself computes in."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
