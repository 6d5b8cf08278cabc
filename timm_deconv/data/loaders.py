"""timm's transforms and loaders, plus the padded random crop of the CIFAR recipes.

Images leave the loader as bytes; the task scales them on the device, as timm's prefetcher does: a quarter of the memory
travels.
"""

from collections.abc import Callable
from typing import Any

import timm.data
from timm.data.transforms import MaybePILToTensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from timm_deconv.errors import InputError


def create_transform(
    input_size: tuple[int, int, int],
    *,
    augmentation: str = "none",
    crop_padding: int = 4,
    scale: tuple[float, float] = (0.08, 1.0),
    hflip: float = 0.0,
    crop_pct: float = 1.0,
    interpolation: str = "bilinear",
) -> Callable[[Any], Any]:
    """PIL image -> uint8 tensor of input_size.

    Args:
        input_size: channels, height, width.
        augmentation: `pad_crop`, `rrc`, or `none`, which resizes and crops the centre.
        crop_padding: pixels of zeros on each side, for `pad_crop`.
        scale: range of the area kept, for `rrc`.
        hflip: probability of a mirror image, with `pad_crop` and `rrc`.
        crop_pct: side of the crop over side resized to, for `none`.
        interpolation: of resizing.
    """
    mode = "RGB" if input_size[0] == 3 else "L"
    steps: list[Callable[[Any], Any]] = [_Convert(mode)]
    size = input_size[1:]
    if augmentation == "pad_crop":
        steps += [
            transforms.RandomCrop(size, padding=crop_padding, pad_if_needed=True),
            transforms.RandomHorizontalFlip(hflip),
            MaybePILToTensor(),
        ]
        return transforms.Compose(steps)
    training = augmentation == "rrc"
    steps.append(
        timm.data.create_transform(
            input_size,
            is_training=training,
            use_prefetcher=True,
            scale=scale if training else None,
            hflip=hflip,
            color_jitter=None,
            crop_pct=crop_pct,
            interpolation=interpolation,
        )
    )
    return transforms.Compose(steps)


class _Convert:
    """PIL image -> PIL image of the mode; a class, as workers must be able to pickle it."""

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, image: Any) -> Any:
        return image.convert(self.mode)


def create_loader(
    dataset: Dataset,
    transform: Callable[[Any], Any],
    *,
    batch_size: int,
    training: bool,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """timm's loader of (uint8 images (B, C, H, W), class indices (B,)).

    In training the order is random and what does not fill a batch is left out.

    Raises:
        InputError: fewer training images than a batch.
    """
    if training and len(dataset) < batch_size:
        raise InputError(f"batch_size={batch_size}: there are only {len(dataset)} training images; lower it")
    loader = timm.data.create_loader(
        dataset,
        input_size=(3, 32, 32),  # only for timm's own transform, replaced below
        batch_size=batch_size,
        is_training=training,
        use_prefetcher=False,
        num_workers=workers,
        # workers that start afresh take their seeds from the epoch's, so a resumed run sees the same augmentation
        persistent_workers=False,
        pin_memory=pin_memory,
    )
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    whole.transform = transform
    return loader
