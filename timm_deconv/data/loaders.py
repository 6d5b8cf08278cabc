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

from .images import as_mode, mode_of
from .streams import ImageStream, StreamLoader, evaluation_loader


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
    steps: list[Callable[[Any], Any]] = [_Convert(mode_of(channels))]
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
        return as_mode(image, self.mode)


def create_loader(
    dataset: Dataset,
    transform: Callable[[Any], Any],
    *,
    batch_size: int,
    training: bool,
    workers: int = 0,
    pin_memory: bool = False,
    collate: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> DataLoader | StreamLoader:
    """Create timm's loader of (uint8 images (B, C, H, W), targets): class indices (B,) or masks (B, H, W).

    Args:
        dataset: of PIL images and class indices, or of images and masks.
        transform: of an image (and mask) into tensors; the data set keeps it.
        batch_size: images a batch, over all processes.
        training: draw in random order, and leave out what does not fill a batch.
        workers: processes that load images; 0 loads in this one.
        pin_memory: copy batches to memory from which a GPU reads without waiting.
        collate: makes a batch of a list of samples; None stacks them.
        seed: of the order of a stream.

    Raises:
        InputError: fewer training images than a batch.
    """
    if isinstance(dataset, ImageStream):
        dataset.transform = transform
        settings: dict[str, Any] = {"workers": workers, "pin_memory": pin_memory}
        if training:
            return StreamLoader(dataset, batch_size, seed=seed, **settings)
        return evaluation_loader(dataset, batch_size, **settings)
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
        collate_fn=collate,
    )
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    whole.transform = transform
    return loader
