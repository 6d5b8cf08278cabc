"""What statistics are estimated from: batches of images, alone or with targets."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from timm_deconv.errors import InputError

__all__ = ["checked_count", "image_batches", "images_of"]


def checked_count(batches: int | None) -> int | None:
    """The most batches to use, None for all; InputError if there are none."""
    if batches is not None and batches < 1:
        raise InputError(f"batches={batches}: at least one is needed; None takes all")
    return batches


def image_batches(loader: Iterable[Any]) -> Iterable[Any]:
    """The batches of a loader; a tensor (N, C, H, W) is one batch, another shape an InputError."""
    if not isinstance(loader, Tensor):
        return loader
    if loader.ndim != 4:
        raise InputError(f"a tensor of shape {tuple(loader.shape)}: give batches of images (N, C, H, W)")
    return [loader]


def images_of(batch: Any, like: Tensor) -> Tensor:
    """The images of a batch, which may be first of a tuple or list, on the device and in the dtype of a weight.

    Raises:
        InputError: they are no floating-point tensor.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"a batch of {kind}: give normalised floating-point images, or (images, targets)")
    return images.to(like.device, like.dtype)
