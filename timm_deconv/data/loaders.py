"""timm's transforms, plus the padded random crop of the CIFAR recipes, and loaders in an order of our own.

Images leave the loader as bytes; the task scales them on the device, as timm's prefetcher does: a quarter of the memory
travels.
"""

from collections.abc import Callable
from typing import Any

import timm.data
import torch
from timm.data.transforms import MaybePILToTensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from timm_deconv.errors import InputError

from .sampling import EpochSampler, Seeded
from .workers import outlive_signals


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
    """Make the transform of a PIL image into a uint8 tensor of input_size.

    Args:
        input_size: channels, height, width.
        augmentation: `pad_crop`, `rrc`, or `none`, which resizes and crops the centre.
        crop_padding: pixels of zeros on each side, for `pad_crop`.
        scale: range of the area kept, for `rrc`.
        hflip: probability of a mirror image, with `pad_crop` and `rrc`.
        crop_pct: side of the crop over side resized to, for `none`.
        interpolation: of resizing.
    """
    channels, *size = input_size
    steps: list[Callable[[Any], Any]] = [_Convert("RGB" if channels == 3 else "L")]
    if augmentation == "pad_crop":
        steps += [
            transforms.RandomCrop(size, padding=crop_padding, pad_if_needed=True),
            transforms.RandomHorizontalFlip(hflip),
            MaybePILToTensor(),
        ]
    else:
        training = augmentation == "rrc"
        timms = timm.data.create_transform(
            input_size,
            is_training=training,
            use_prefetcher=True,
            scale=scale if training else None,
            hflip=hflip,
            color_jitter=None,
            crop_pct=crop_pct,
            interpolation=interpolation,
        )
        steps.append(timms)
    return transforms.Compose(steps)


class _Convert:
    """PIL image to PIL image of a mode; a class, as workers must be able to pickle it."""

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
    seed: int = 0,
) -> DataLoader:
    """Create a loader of (uint8 images (B, C, H, W), class indices (B,)).

    Args:
        dataset: of PIL images and class indices.
        transform: of an image into a tensor; the data set keeps it.
        batch_size: images a batch, over all processes.
        training: draw from where and for whom the loader's `batch_sampler`, an `EpochSampler`, says; images are
            augmented as seed, epoch and index have it. Else all images in their order.
        workers: processes that load images; 0 loads in this one.
        pin_memory: copy batches to memory from which a GPU reads without waiting.
        seed: of order and augmentation.

    Raises:
        InputError: fewer training images than a batch.
    """
    if training and len(dataset) < batch_size:
        raise InputError(f"batch_size={batch_size}: there are only {len(dataset)} training images; lower it")
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    whole.transform = transform
    batches: dict[str, Any] = {"batch_size": batch_size}
    if training:
        batches = {"batch_sampler": EpochSampler(len(dataset), batch_size, seed)}
        dataset = Seeded(dataset, seed)
    return DataLoader(
        dataset,
        **batches,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=outlive_signals(),
        generator=torch.Generator(),  # the default one is the network's
    )
