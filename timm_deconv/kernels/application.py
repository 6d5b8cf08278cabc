"""D times a weight, or times the runs of channels of images, and both gradients.

Runs of channels are multiplied by a 1x1 convolution where that is much work, in the precision of convolutions (TF32 on
GPUs, where these are): on a CPU this was up to 3 times as fast as matrix products.
"""

import torch
from torch import Tensor

from timm_deconv.linalg import full_precision

from .blocks import Blocks, merge_weight, split_weight
from .onednn import POINTWISE, as_images, as_kernel, few_products, inner_products, rows_times
from .operation import Operation

__all__ = ["apply_whitener", "apply_whitener_backward"]


def _apply_whitener(values: Tensor, whitener: Tensor, blocks: Blocks) -> Tensor:
    """Multiply every block of features by its whitener from the right, R F^2 products for R rows of F features.

    Args:
        values: a weight (O, C / groups, height, width); or, with blocks of pixels and one group, images (N, C, H, W).
        whitener: (S, F, F).
        blocks: which features meet which whitener.

    Returns:
        the shape, dtype and memory format of `values`.
    """
    with full_precision(values):
        matrix = whitener.to(values.dtype)
        if not _one_for_all_pixels(blocks):
            return _merge_like(rows_times(split_weight(values, blocks), matrix), values, blocks)
        features, last = blocks.features, _in_channels_last(values)
        if last and few_products(values, features):
            return _in_format(torch.bmm(_pixels(values, features), matrix), values)
        whitened = torch.conv2d(_runs_apart(values, features, last), as_kernel(matrix))
        return _formatted(_runs_together(whitened, values, last), values)


def _apply_whitener_backward(
    grad: Tensor, values: Tensor, whitener: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of values and whitener, of their shapes and dtypes, from that of `apply_whitener`.

    Args:
        grad: the shape and dtype of `values`.
        values, whitener, blocks: those of the forward pass.
    """
    with full_precision(values):
        matrix = whitener.to(values.dtype)
        if not _one_for_all_pixels(blocks):
            grad_rows, rows = split_weight(grad, blocks), split_weight(values, blocks)
            grad_values = _merge_like(rows_times(grad_rows, matrix.mT), values, blocks)
            return grad_values, inner_products(rows, grad_rows).to(whitener.dtype)
        features, last = blocks.features, _in_channels_last(values)
        if last and few_products(values, features):
            pixels = _pixels(grad, features)
            grad_whitener = torch.bmm(_pixels(values, features).mT, pixels)
            return _in_format(torch.bmm(pixels, matrix.mT), values), grad_whitener.to(whitener.dtype)
        grad_values, grad_kernel, _ = torch.ops.aten.convolution_backward(
            _runs_apart(grad, features, last),
            _runs_apart(values, features, last),
            as_kernel(matrix),
            [0],
            *POINTWISE,
            [True, True, False],
        )
        grad_whitener = grad_kernel.permute(2, 1, 0, 3).squeeze(-1).to(whitener.dtype).contiguous()
        return _formatted(_runs_together(grad_values, values, last), values), grad_whitener


def plain_application(values: Tensor, whitener: Tensor, blocks: Blocks) -> Tensor:
    """Do what `apply_whitener` does, values (O, ...) times D (S, F, F), by operations that can be derived twice."""
    with full_precision(values):
        return merge_weight(split_weight(values, blocks) @ whitener.to(values.dtype), list(values.shape), blocks)


def _one_for_all_pixels(blocks: Blocks) -> bool:
    """Tell whether one D multiplies every run of F channels, so that it is the kernel of a 1x1 convolution."""
    return blocks.pixels and blocks.groups == 1


def _in_channels_last(values: Tensor) -> bool:
    return values.is_contiguous(memory_format=torch.channels_last)


def _merge_like(rows: Tensor, weight: Tensor, blocks: Blocks) -> Tensor:
    """Merge rows in the shape and memory format of the weight."""
    return _formatted(merge_weight(rows, list(weight.shape), blocks), weight)


def _formatted(values: Tensor, like: Tensor) -> Tensor:
    """Return values in channels_last if `like` is so alone, else contiguous, as the fake form promises."""
    if like.is_contiguous() or not _in_channels_last(like):
        return values.reshape(-1).view(like.shape)  # contiguous() leaves 1x1 kernels in what looks like channels_last
    return values.contiguous(memory_format=torch.channels_last)


def _pixels(values: Tensor, features: int) -> Tensor:
    """Return runs of F channels as rows (1, R, F), a view in channels_last."""
    return values.permute(0, 2, 3, 1).reshape(1, -1, features)


def _in_format(pixels: Tensor, like: Tensor) -> Tensor:
    """Invert `_pixels` of values in channels_last, in the shape and memory format of `like`."""
    if like.is_contiguous():  # too: there is one pixel, or one channel
        return pixels.reshape(like.shape)
    count, channels, height, width = like.shape
    return pixels.reshape(count, height, width, channels).permute(0, 3, 1, 2)


def _runs_apart(values: Tensor, features: int, last: bool) -> Tensor:
    """View values as images of F channels: a run of channels becomes a pixel in channels_last, else an image."""
    return as_images(_pixels(values, features)) if last else values.reshape(-1, features, *values.shape[2:])


def _runs_together(images: Tensor, like: Tensor, last: bool) -> Tensor:
    """Invert `_runs_apart`, in the shape and memory format of `like`."""
    return _in_format(images.permute(0, 2, 3, 1), like) if last else images.reshape(like.shape)


def _fake_application(values: Tensor, whitener: Tensor, blocks: Blocks) -> Tensor:
    return _formatted(torch.empty_like(values), values)


def _fake_backward(grad: Tensor, values: Tensor, whitener: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    return _formatted(torch.empty_like(values), values), whitener.new_empty(whitener.shape)


def _backward(
    grads: tuple[Tensor], kept: list[Tensor], values: Tensor, whitener: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    return apply_whitener_backward(*grads, values, whitener, blocks)


apply_whitener = Operation(_apply_whitener, "(Tensor values, Tensor whitener, SymInt[] blocks) -> Tensor")
apply_whitener.register_fake(_fake_application)
apply_whitener.register_autograd(_backward, plain_application, keep=lambda whitened: [])

apply_whitener_backward = Operation(
    _apply_whitener_backward, "(Tensor grad, Tensor values, Tensor whitener, SymInt[] blocks) -> (Tensor, Tensor)"
)
apply_whitener_backward.register_fake(_fake_backward)
