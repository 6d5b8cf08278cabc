"""The network that is exported: evaluation only, its whitening and its norms folded into plain layers."""

import copy
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.convert import fuse
from timm_deconv.convert.bn_folding import fold_norms_in_place
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.errors import InputError

__all__ = ["check_images", "first_line", "largest_difference", "plain_form", "run"]

OTHER_SIZE = (33, 70)
"""Pixels more, in height and width, of the images that a network of any size is checked on: what a network pads by is
another there, and height is not width."""


def plain_form(model: nn.Module) -> nn.Module:
    """Copy a network, in evaluation mode and without gradients, with its whitening and its batch norms folded away.

    Batch norms that follow no convolution stay: they are plain layers too.

    Raises:
        InputError: what `fuse` refuses, or a batch-norm network that does not run on images of its configuration.
    """
    plain = fuse(model) if is_whitened(model) else copy.deepcopy(model).eval()
    fold_norms_in_place(plain)
    return plain.requires_grad_(False)


def check_images(model: nn.Module, dynamic: bool) -> list[Tensor]:
    """Make the images that an export is checked on, always the same ones.

    Returns:
        One batch (1, C, H, W) of the network's own size; for `dynamic` ones of 2, and of 3 at another size, too.

    Raises:
        InputError: the network has no timm configuration.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg:
        raise InputError(f"{type(model).__name__} has no pretrained_cfg, which says what images it takes: use timm's")
    channels, height, width = cfg["input_size"]
    channels = next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), channels)
    sizes = [(1, height, width)]
    if dynamic:
        sizes += [(2, height, width), (3, height + OTHER_SIZE[0], width + OTHER_SIZE[1])]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, channels, *size, generator=generator) for count, *size in sizes]


def run(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Evaluate a network on images: (N, C, H, W) -> its one output, in float32.

    Raises:
        InputError: it has not one tensor as its output, or does not take such images.
    """
    try:
        with torch.inference_mode():
            output = model(images)
    except (RuntimeError, AssertionError) as error:
        size = "x".join(map(str, images.shape[2:]))
        raise InputError(f"the network does not take {len(images)} images of {size} ({first_line(error)})") from error
    if not isinstance(output, Tensor):
        raise InputError(f"the network gives a {type(output).__name__}: only what gives one tensor is exported")
    return output.float()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty, shortened."""
    lines = (line.strip() for line in str(error).splitlines())
    return textwrap.shorten(next(filter(None, lines), type(error).__name__), 160, placeholder=" ...")


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of two outputs over the largest of the wanted values.

    Infinite where the found ones are not finite, or have another shape.
    """
    if found.shape != wanted.shape or not found.isfinite().all():
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny))
