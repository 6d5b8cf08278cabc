"""Transforms of an image and its mask together, by torchvision's transforms of the second version."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from .segmentation import IGNORED

__all__ = ["PaddedBatch", "create_joint_transform"]


def create_joint_transform(
    input_size: tuple[int, int, int],
    *,
    training: bool,
    augmentation: str = "none",
    scale: tuple[float, float] = (0.5, 2.0),
    hflip: float = 0.0,
    crop_pct: float = 1.0,
    interpolation: str = "bilinear",
    mean: Sequence[float] = (0.5,),
) -> Callable[[Image.Image, Image.Image], tuple[Tensor, Tensor]]:
    """Make the transform of a PIL image and mask into uint8 tensors (C, H, W) and (H, W).

    With `scale_crop` the smaller side is resized to `input_size / crop_pct`: in training times a random factor, then a
    window of `input_size` is cut out at random; in evaluation the whole image is kept. With `none` both are resized to
    `input_size`. Masks are resized to the nearest pixel.

    Args:
        input_size: channels, height, width of training images.
        training: mirror, scale and crop at random.
        augmentation: `scale_crop` or `none`.
        scale: range of the random factor.
        hflip: probability of a mirror image in training.
        crop_pct: smaller side of `input_size` over the side resized to.
        interpolation: of resizing images.
        mean: of the channels, 0..1: the colour around an image that is smaller than the window, where the mask is
            IGNORED.
    """
    _, *size = input_size
    side, resampling = round(min(size) / crop_pct), InterpolationMode(interpolation)
    steps: list[Any] = []
    if augmentation == "none":
        steps.append(v2.Resize(size, resampling))
    elif not training:
        steps.append(v2.Resize(side, resampling))
    else:
        fill = {tv_tensors.Image: [255 * value for value in mean], tv_tensors.Mask: IGNORED}
        low, high = (round(side * factor) for factor in scale)
        # its range leaves out the last number
        steps += [v2.RandomResize(low, high + 1, resampling), v2.RandomCrop(size, pad_if_needed=True, fill=fill)]
    if training:
        steps.append(v2.RandomHorizontalFlip(hflip))
    return _Joint(v2.Compose(steps))


class _Joint:
    """A class, as workers must be able to pickle it."""

    def __init__(self, steps: Callable[..., Any]) -> None:
        self.steps = steps

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        both = tv_tensors.Image(pil_to_tensor(image)), tv_tensors.Mask(pil_to_tensor(mask)[0])
        pixels, classes = self.steps(*both)
        return pixels.as_subclass(Tensor), classes.as_subclass(Tensor)


class PaddedBatch:
    """Collate images (C, H, W) and masks (H, W) of several sizes: what lies outside one is of mean colour and IGNORED.

    Args:
        mean: of the channels, 0..1.
    """

    def __init__(self, mean: Sequence[float]) -> None:
        self.colour = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)

    def __call__(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        height, width = (max(mask.shape[axis] for _, mask in samples) for axis in (0, 1))
        images = self.colour[None, :, None, None].repeat(len(samples), 1, height, width)
        masks = torch.full((len(samples), height, width), IGNORED, dtype=torch.uint8)
        for i, (image, mask) in enumerate(samples):
            images[i, :, : image.shape[1], : image.shape[2]] = image
            masks[i, : mask.shape[0], : mask.shape[1]] = mask
        return images, masks
