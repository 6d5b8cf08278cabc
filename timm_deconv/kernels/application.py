"""D times the runs of channels of images, and both gradients.

They are multiplied by a 1x1 convolution where that is much work, in the precision of convolutions (TF32 on GPUs, where
these are): on a CPU this was up to 3 times as fast as matrix products.
"""

import torch
from torch import Tensor

from timm_deconv.linalg import full_precision

from .formats import in_format, is_channels_last
from .onednn import POINTWISE, as_images, as_kernel, few_products
from .operation import Operation

__all__ = ["apply_whitener", "apply_whitener_backward"]


def _apply_whitener(images: Tensor, whitener: Tensor) -> Tensor:
    """Multiply every run of F channels of images (N, C, H, W) by a whitener (1, F, F) from the right.

    N C H W F products; the dtype and memory format of the images.
    """
    with full_precision(images):
        matrix, features = whitener.to(images.dtype), whitener.shape[-1]
        last = images.is_contiguous(memory_format=torch.channels_last)
        if last and few_products(images, features):
            return _together(torch.bmm(_pixels(images, features), matrix), images)
        whitened = torch.conv2d(_runs_apart(images, features, last), as_kernel(matrix))
        return in_format(_runs_together(whitened, images, last), is_channels_last(images))


def _apply_whitener_backward(grad: Tensor, images: Tensor, whitener: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of images and whitener, of their shapes and dtypes, from that of `apply_whitener`.

    Args:
        grad: the shape and dtype of `images`.
        images, whitener: those of the forward pass.
    """
    with full_precision(images):
        matrix, features = whitener.to(images.dtype), whitener.shape[-1]
        last = images.is_contiguous(memory_format=torch.channels_last)
        if last and few_products(images, features):
            pixels = _pixels(grad, features)
            grad_whitener = torch.bmm(_pixels(images, features).mT, pixels)
            return _together(torch.bmm(pixels, matrix.mT), images), grad_whitener.to(whitener.dtype)
        grad_images, grad_kernel, _ = torch.ops.aten.convolution_backward(
            _runs_apart(grad, features, last),
            _runs_apart(images, features, last),
            as_kernel(matrix),
            [0],
            *POINTWISE,
            [True, True, False],
        )
        grad_whitener = grad_kernel.permute(2, 1, 0, 3).squeeze(-1).to(whitener.dtype).contiguous()
        return in_format(_runs_together(grad_images, images, last), is_channels_last(images)), grad_whitener


def plain_application(images: Tensor, whitener: Tensor) -> Tensor:
    """Do what `apply_whitener` does, images (N, C, H, W) times D (1, F, F), by operations that can be derived twice."""
    with full_precision(images):
        runs = images.movedim(1, -1).unflatten(-1, [-1, whitener.shape[-1]])
        return (runs @ whitener[0].to(images.dtype)).flatten(-2).movedim(-1, 1)


def _pixels(images: Tensor, features: int) -> Tensor:
    """Return runs of F channels as rows (1, R, F), a view in channels_last."""
    return images.permute(0, 2, 3, 1).reshape(1, -1, features)


def _together(pixels: Tensor, like: Tensor) -> Tensor:
    """Invert `_pixels` of images in channels_last, in the shape and memory format of `like`."""
    if like.is_contiguous():  # too: there is one pixel, or one channel
        return pixels.reshape(like.shape)
    count, channels, height, width = like.shape
    return pixels.reshape(count, height, width, channels).permute(0, 3, 1, 2)


def _runs_apart(images: Tensor, features: int, last: bool) -> Tensor:
    """View images as those of F channels: a run of channels becomes a pixel in channels_last, else an image."""
    return as_images(_pixels(images, features)) if last else images.reshape(-1, features, *images.shape[2:])


def _runs_together(images: Tensor, like: Tensor, last: bool) -> Tensor:
    """Invert `_runs_apart`, in the shape and memory format of `like`."""
    return _together(images.permute(0, 2, 3, 1), like) if last else images.reshape(like.shape)


def _fake_application(images: Tensor, whitener: Tensor) -> Tensor:
    return in_format(torch.empty_like(images), is_channels_last(images))


def _fake_backward(grad: Tensor, images: Tensor, whitener: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_application(images, whitener), whitener.new_empty(whitener.shape)


def _backward(grads: tuple[Tensor], kept: list[Tensor], images: Tensor, whitener: Tensor) -> tuple[Tensor, Tensor]:
    return apply_whitener_backward(*grads, images, whitener)


apply_whitener = Operation(_apply_whitener, "(Tensor images, Tensor whitener) -> Tensor")
apply_whitener.register_fake(_fake_application)
apply_whitener.register_autograd(_backward, plain_application, keep=lambda whitened: [])

apply_whitener_backward = Operation(
    _apply_whitener_backward, "(Tensor grad, Tensor images, Tensor whitener) -> (Tensor, Tensor)"
)
apply_whitener_backward.register_fake(_fake_backward)
