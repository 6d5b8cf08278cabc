"""The plain convolution or linear layer within a whitening one, and its way back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_deconv.kernels.formats import on_cpu

from .geometry import ConvGeometry

__all__ = ["as_images", "computing_dtype", "convolve", "convolve_backward", "sum_outputs"]


def convolve(x: Tensor, weight: Tensor, bias: Tensor, geometry: ConvGeometry) -> Tensor:
    """Convolve x with another weight and bias in a layer's geometry.

    Args:
        x: (N, C, H, W).
        weight: (O, C / groups, h, w). bias: (O,); all of one dtype.
        geometry: the layer's.

    Returns:
        (N, O, H', W'), of vectors (R, O).
    """
    if geometry.linear:
        return F.linear(x.flatten(1), weight.flatten(1), bias)
    window = geometry.window
    return torch.conv2d(x, weight, bias, window.stride, window.padding, window.dilation, geometry.groups)


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, with_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Compute the gradients of x (None unless `with_x`) and weight from that of `convolve`; see `sum_outputs` too.

    Args:
        grad: the shape of the output.
        x, weight, geometry: those of the forward pass.
        with_x: whether the gradient of x is asked for.
    """
    if geometry.linear:
        grad_x = as_images(grad @ weight.flatten(1)) if with_x else None
        return grad_x, as_images(grad.mT @ x.flatten(1))
    window, needed = geometry.window, [with_x, True, False]
    arguments = (window.stride, window.padding, window.dilation, False, [0, 0], geometry.groups)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, [0], *arguments, needed)
    return grad_x, grad_weight


def as_images(vectors: Tensor) -> Tensor:
    """View vectors (R, C) as images of one pixel, (R, C, 1, 1)."""
    return vectors[:, :, None, None]


def sum_outputs(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the gradient of the bias (O,), in its dtype, from that of the output (N, O, ...).

    A processor was seen to take 5 ms for it in the convolution's own backward pass, and 0.8 ms for the sum; 20 ms where
    it had to convert the numbers first, which a GPU does not.
    """
    others = (0, *range(2, grad.ndim))
    return grad.sum(others).to(dtype) if on_cpu(grad) else grad.sum(others, dtype=dtype)


def computing_dtype(x: Tensor) -> torch.dtype:
    """Return what a convolution or linear layer of x (N, ...) itself computes in."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
