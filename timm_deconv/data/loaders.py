"""timm's transforms, plus the padded random crop of the CIFAR recipes, and loaders in an order of our own.

Images leave the loader as bytes; the task scales them on the device, as timm's prefetcher does: a quarter of the memory
travels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import timm.data
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import MaybePILToTensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from timm_deconv.errors import InputError

from .images import as_mode, mode_of
from .sampling import EpochSampler, Seeded
from .streams import ImageStream, StreamLoader, evaluation_loader
from .workers import outlive_signals


def create_transform(
    input_size: tuple[int, int, int],
    *,
    augmentation: str = "none",
    aa: str | None = None,
    mean: Sequence[float] = (0.5,),
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
        aa: RandAugment by timm, as in 'rand-m9-mstd0.5', for `pad_crop` and `rrc`.
        mean: of the channels, 0..1: the colour that RandAugment fills with.
        crop_padding: pixels of zeros on each side, for `pad_crop`.
        scale: range of the area kept, for `rrc`.
        hflip: probability of a mirror image, with `pad_crop` and `rrc`.
        crop_pct: side of the crop over side resized to, for `none`.
        interpolation: of resizing.

    Raises:
        InputError: what `aa` says is not known.
    """
    channels, *size = input_size
    rand_augment = _rand_augment(aa, min(size), mean) if aa else None
    steps: list[Callable[[Any], Any]] = [_Convert(mode_of(channels))]
    if augmentation == "pad_crop":
        steps += [
            transforms.RandomCrop(size, padding=crop_padding, pad_if_needed=True),
            transforms.RandomHorizontalFlip(hflip),
            *([rand_augment] if rand_augment else []),
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
            auto_augment=aa,
            mean=mean,
            crop_pct=crop_pct,
            interpolation=interpolation,
        )
        steps.append(timms)
    return transforms.Compose(steps)


def as_bytes(channels: int) -> Callable[[Any], Any]:
    """Make the transform of a PIL image into a uint8 tensor of 1 or 3 channels and its own size."""
    return transforms.Compose([_Convert(mode_of(channels)), MaybePILToTensor()])


def _rand_augment(aa: str, side: int, mean: Sequence[float]) -> Callable[[Any], Any]:
    """Make timm's RandAugment with the settings of timm's own transforms."""
    settings = {"translate_const": int(side * 0.45), "img_mean": tuple(round(255 * value) for value in mean)}
    try:
        return rand_augment_transform(aa, settings)
    except (AssertionError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"aa={aa!r} is none of timm's RandAugment, as in 'rand-m9-mstd0.5-inc1' ({reason})") from None


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
    seed: int = 0,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader | StreamLoader:
    """Create a loader of (uint8 images (B, C, H, W), targets): class indices (B,) or masks (B, H, W).

    Args:
        dataset: of PIL images and class indices, or of images and masks.
        transform: of an image (and mask) into tensors; the data set keeps it.
        batch_size: images a batch, over all processes.
        training: draw from where and for whom the loader's `batch_sampler`, an `EpochSampler`, says; images are
            augmented as seed, epoch and index have it (but for streams, see `StreamLoader`). Else all images in their
            order.
        workers: processes that load images; 0 loads in this one.
        pin_memory: copy batches to memory from which a GPU reads without waiting.
        seed: of order and augmentation.
        collate: makes a batch of a list of samples; None stacks them.

    Raises:
        InputError: fewer training images than a batch.
    """
    if training and len(dataset) < batch_size:
        raise InputError(f"batch_size={batch_size}: there are only {len(dataset)} training images; lower it")
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    whole.transform = transform
    settings = {"num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": outlive_signals()}
    if isinstance(dataset, ImageStream):
        if training:
            return StreamLoader(dataset, batch_size, seed, **settings)
        return evaluation_loader(dataset, batch_size, **settings)
    batches: dict[str, Any] = {"batch_size": batch_size}
    if training:
        batches = {"batch_sampler": EpochSampler(len(dataset), batch_size, seed)}
        dataset = Seeded(dataset, seed)
    # the default generator is the network's
    return DataLoader(dataset, **batches, **settings, collate_fn=collate, generator=torch.Generator())
