"""A small data set as bytes on the device, where batches are cut out and mirrored: no card waits for a loader."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_deconv.errors import InputError

from .loaders import create_loader
from .sampling import EpochSampler
from .streams import ImageStream

__all__ = ["CachedImages", "cached_loader"]

SHARE = 0.5
"""Of the card's free memory that the images may take: the rest is the network's."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Odd, and 2^64 over the golden ratio: spreads whole numbers that follow each other."""

DRAWS = 3
"""Numbers that are drawn for an image: row, column, mirror."""


class CachedImages(Dataset):
    """Images and classes on a device, which are had by the batch.

    Args:
        images: (N, C, H, W), bytes, with their border of zeros where `size` is smaller.
        targets: (N,).
        size: height and width of what is cut out.
        hflip: probability of a mirror image.
        seed: of the run; where an image is cut out depends on seed, epoch and index alone.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, size: tuple[int, int], hflip: float = 0.0, seed: int = 0
    ) -> None:
        self.images, self.targets, self.size, self.hflip, self.seed = images, targets, size, hflip, seed
        device = images.device
        self.channels = torch.arange(images.shape[1], device=device)[None, :, None, None]
        self.rows, self.columns = (torch.arange(side, device=device) for side in size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[int] | Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return a batch: of indices as the images are, of (epoch, index) cut out and mirrored at random."""
        places = np.array(keys, dtype=np.int64)
        if places.ndim == 1:
            index = torch.from_numpy(places).to(self.images.device, non_blocking=True)
            return self.images[index], self.targets[index]
        windows = torch.from_numpy(self.windows(places)).to(self.images.device, non_blocking=True)
        index, top, left, mirrored = windows[:, :, None]
        columns = torch.where(mirrored > 0, self.size[1] - 1 - self.columns, self.columns) + left
        rows = (self.rows + top)[:, None, :, None]
        images = self.images[index[:, :, None, None], self.channels, rows, columns[:, None, None, :]]
        return images, self.targets[index[:, 0]]

    def windows(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw windows (4, B) for places (B, 2) of epoch and index: index, top, left, and 1 for a mirror image."""
        drawn = _hashed(self.seed, places)
        choices = np.array([have - cut + 1 for have, cut in zip(self.images.shape[2:], self.size, strict=True)])
        offsets = drawn[:2] % choices[:, None].astype(np.uint64)
        mirrored = drawn[2] < np.uint64(round(self.hflip * 2**32))
        return np.stack([places[:, 1], *offsets.astype(np.int64), mirrored.astype(np.int64)])


def cached_loader(
    dataset: Dataset,
    transform: Callable[[Any], Any],
    *,
    batch_size: int,
    training: bool,
    device: torch.device,
    workers: int = 0,
    crop: tuple[int, int] | None = None,
    crop_padding: int = 0,
    hflip: float = 0.0,
    seed: int = 0,
) -> DataLoader:
    """Read a data set, and create a loader of batches on the device, (uint8 images (B, C, H, W), class indices (B,)).

    Args:
        dataset: of PIL images and class indices.
        transform: of an image into a tensor, the same every time, of the same size for all.
        batch_size: images a batch, over all processes.
        training: draw as `create_loader` does, and cut out and mirror.
        device: where images are kept.
        workers: processes that read.
        crop: height and width that training images are cut to, as torchvision's `RandomCrop` does; None leaves them.
        crop_padding: pixels of zeros on each side before that.
        hflip: probability of a mirror image in training.
        seed: of order and augmentation.

    Raises:
        InputError: images of several sizes or smaller than what is cut out, too many for the card, or fewer than a
            batch.
    """
    if isinstance(dataset, ImageStream):
        raise InputError("cache: device keeps what a stream would not; leave cache out")
    if training and len(dataset) < batch_size:  # type: ignore[arg-type]
        raise InputError(f"batch_size={batch_size}: there are only {len(dataset)} training images; lower it")  # type: ignore[arg-type]
    padding = crop_padding if crop and training else 0
    images, targets = _read(dataset, transform, padding, workers, device)
    size = crop if crop and training else tuple(images.shape[2:])
    if any(cut > have for cut, have in zip(size, images.shape[2:], strict=True)):
        raise InputError(
            f"images of {images.shape[2]}x{images.shape[3]} with their padding are smaller than"
            f" input_size={size[0]}x{size[1]}; raise crop_padding, or leave cache out"
        )
    cached = CachedImages(images, targets, size, hflip, seed)
    batches: dict[str, Any] = {"batch_size": batch_size}
    if training:
        batches = {"batch_sampler": EpochSampler(len(cached), batch_size, seed)}
    return DataLoader(cached, **batches, collate_fn=_as_it_is, generator=torch.Generator())


def _read(
    dataset: Dataset, transform: Callable[[Any], Any], padding: int, workers: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Read all images and classes; images get a border of zeros."""
    loader = create_loader(dataset, transform, batch_size=256, training=False, workers=workers, collate=list)
    kept: Tensor | None = None
    targets: list[int] = []
    for samples in loader:
        if kept is None:
            size = samples[0][0].shape
            channels, height, width = size
            kept = _empty((len(dataset), channels, height + 2 * padding, width + 2 * padding), device)  # type: ignore[arg-type]
        if any(image.shape != size for image, _ in samples):
            raise InputError("cache: device keeps images of one size, and these are of several; leave cache out")
        inner = kept[:, :, padding : padding + height, padding : padding + width]
        inner[len(targets) : len(targets) + len(samples)] = torch.stack([image for image, _ in samples]).to(device)
        targets += [target for _, target in samples]
    assert kept is not None
    return kept, torch.tensor(targets, device=device)


def _empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Make a tensor of zeros, if the card has room for it and for a network."""
    needed = math.prod(shape)
    if device.type == "cuda" and needed > SHARE * (free := torch.cuda.mem_get_info(device)[0]):
        raise InputError(
            f"cache: device needs {needed / 2**30:.1f} GiB for {shape[0]} images, more than half of the"
            f" {free / 2**30:.1f} GiB that are free on the card; leave cache out"
        )
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def _as_it_is(batch: Any) -> Any:
    return batch


def _hashed(seed: int, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Draw DRAWS numbers below 2^32 for each place (B, 2): the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    draw = np.arange(DRAWS, dtype=np.uint64)[:, None]
    epoch, index = places.T.astype(np.uint64)
    state = np.full_like(epoch, seed)[None] + draw
    for part in (epoch, index):  # each on what came of those before, so that no two places meet
        state = _mixed(state * GOLDEN + part)
    return state >> np.uint64(32)


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state ^ (state >> np.uint64(31))
