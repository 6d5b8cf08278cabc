"""Images with a class for every pixel: Cityscapes, CamVid, and any folder or tar of images/ and masks/.

Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016; Brostow et al., Semantic object
classes in video, Pattern Recognition Letters 2009.
"""

import io
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset
from torchvision.datasets import Cityscapes

from timm_deconv.errors import InputError

from .datasets import VALIDATION_NAMES, find_split
from .images import as_mode, mode_of
from .unreadable import Unreadable

__all__ = ["IGNORED", "SEGMENTATION", "SegmentationDataset", "class_labels", "create_segmentation"]

IGNORED = 255
"""Class of a pixel that neither trains nor counts."""

SEGMENTATION = ("cityscapes", "camvid", "masks")
"""Names of data sets with masks."""

CAMVID = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
CITYSCAPES = [each for each in Cityscapes.classes if each.id >= 0]


@dataclass(frozen=True)
class Labels:
    """What the numbers in masks mean.

    Attributes:
        names: of the classes.
        classes: number in a mask -> class, or IGNORED; other numbers are errors.
        colours: (red, green, blue) of each class, where the data set has some.
    """

    names: tuple[str, ...]
    classes: Mapping[int, int]
    colours: tuple[tuple[int, int, int], ...] | None = None

    def table(self) -> np.ndarray:
        """Return the classes of the numbers 0..255, -1 for those that mean nothing."""
        table = np.full(256, -1)
        table[list(self.classes)] = list(self.classes.values())
        return table


class Files:
    """The files of a folder or tar by their paths in it; workers open it for themselves.

    Args:
        path: folder or .tar.

    Raises:
        InputError: neither, or a tar that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, tuple[int, int]] | None = None
        if path.is_dir():
            return
        try:
            with tarfile.open(path, "r:") as tar:
                members = [member for member in tar if member.isfile()]
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"{path} cannot be read as a tar ({error}); give a whole one, not compressed") from None
        self.places = {member.name.removeprefix("./"): (member.offset_data, member.size) for member in members}

    def names(self) -> list[str]:
        """List the files in order."""
        if self.places is not None:
            return sorted(self.places)
        return sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())

    def read(self, name: str) -> bytes:
        """Read a file."""
        if self.places is None:
            return (self.path / name).read_bytes()
        offset, size = self.places[name]
        with self.path.open("rb") as tar:
            tar.seek(offset)
            return tar.read(size)


class SegmentationDataset(Dataset):
    """Images and masks of classes, as Pillow's ('RGB' or 'L', and 'L'), or what `transform` makes of the two.

    Args:
        files: where they are.
        pairs: names of each image and its mask.
        labels: what the numbers in masks mean.
        channels: 1 or 3; images are converted.
    """

    def __init__(self, files: Files, pairs: Sequence[tuple[str, str]], labels: Labels, channels: int = 3) -> None:
        self.files, self.pairs, self.labels, self.channels = files, list(pairs), labels, channels
        self.transform: Callable[[Image.Image, Image.Image], Any] | None = None
        self.unreadable = Unreadable()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        image, mask = self.unreadable.readable(self._read, index, len(self), self.filename, self._empty)
        return self.transform(image, mask) if self.transform else (image, mask)

    def check(self) -> None:
        """Read every mask and the head of every image, so that what is wrong with them is said before training.

        Takes what decoding the masks takes, over the processor's cores.

        Raises:
            InputError: a mask of another size than its image, of colours, or with a number that is no class's.
            OSError: a file that cannot be read.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(self._check, range(len(self))))

    def _check(self, index: int) -> None:
        self.unreadable.readable(self._compare, index, len(self), self.filename, self._empty)

    def filename(self, index: int) -> str:
        """Return the paths of an image and its mask."""
        image, mask = self.pairs[index]
        return f"{self.files.path / image} with mask {mask}"

    def _read(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, mask = self._compare(index)
        return as_mode(image, mode_of(self.channels)), mask

    def _empty(self) -> tuple[Image.Image, Image.Image]:
        return Image.new(mode_of(self.channels), (1, 1)), Image.new("L", (1, 1), IGNORED)

    def _compare(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Open an image, which is not decoded yet, and its mask, and check that they are of one size."""
        image, mask = self._open(self.pairs[index][0]), self._mask(index)
        if image.size != mask.size:
            sizes = ("{}x{}".format(*each.size) for each in (mask, image))
            raise InputError(f"mask {self._path(index)} is {' and its image '.join(sizes)}; both need one size")
        return image, mask

    def _mask(self, index: int) -> Image.Image:
        numbers = np.asarray(self._open(self.pairs[index][1]))
        if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
            raise InputError(f"mask {self._path(index)} is a picture of colours; it needs one number a pixel")
        if numbers.max() > 255:
            raise InputError(self._unknown(index, int(numbers.max())))
        numbers = numbers.astype(np.uint8)
        classes = self.labels.table()
        (found,) = np.nonzero(np.bincount(numbers.ravel(), minlength=256))
        if (unknown := found[classes[found] < 0]).size:
            raise InputError(self._unknown(index, int(unknown[0])))
        return Image.fromarray(classes.astype(np.uint8)[numbers])

    def _unknown(self, index: int, number: int) -> str:
        known = [key for key, value in self.labels.classes.items() if value != IGNORED]
        return (
            f"mask {self._path(index)} has pixels of {number}, which is no class: there are {min(known)} to"
            f" {max(known)}, and {IGNORED} for what does not count"
        )

    def _path(self, index: int) -> Path:
        return self.files.path / self.pairs[index][1]

    def _open(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(self.files.read(name)))


def create_segmentation(
    name: str, root: str | None, split: str, num_classes: int, *, channels: int = 3
) -> SegmentationDataset:
    """Create one split of a data set of images and masks.

    Args:
        name: one of SEGMENTATION. `cityscapes` is laid out as its publishers do, leftImg8bit/ and gtFine/ beside each
            other; `camvid` and `masks` are train, val (or test) folders or tars of images/NAME and masks/NAME, where
            endings may differ. Masks of `camvid` hold 0..10, and 11 for what does not count; others 0..num_classes - 1.
        root: the data folder.
        split: train, or validation (also found as val, valid, test, eval), or another folder's name.
        num_classes: of the network.
        channels: 1 or 3; images are converted.

    Raises:
        InputError: no such folder or split, other classes than the network's, or images without masks.
    """
    if root is None or not Path(root).exists():
        raise InputError(f"no data folder {root}; give --data-dir (or data_dir=...)")
    labels = class_labels(name, num_classes)
    if name == "cityscapes":
        return _cityscapes(Path(root), split, labels, channels)
    if (path := find_split(Path(root), split)) is None:
        raise InputError(f"no {split} folder or tar of images/ and masks/ in {root}")
    files = Files(path)
    return SegmentationDataset(files, _pairs(files), labels, channels)


def class_labels(name: str, num_classes: int) -> Labels:
    """Say what the numbers in the masks of a data set mean.

    Raises:
        InputError: it has another number of classes.
    """
    if name == "cityscapes":
        counted = sorted((each for each in CITYSCAPES if each.train_id != IGNORED), key=lambda each: each.train_id)
        names, colours = [each.name for each in counted], tuple(each.color for each in counted)
        classes = {each.id: each.train_id for each in CITYSCAPES}
    elif name == "camvid":
        names, colours = list(CAMVID), tuple(CAMVID.values())
        classes = {**{index: index for index in range(len(CAMVID))}, len(CAMVID): IGNORED}
    else:
        names, colours = [str(index) for index in range(min(num_classes, IGNORED))], None
        classes = {index: index for index in range(len(names))}
    if len(names) != num_classes:
        raise InputError(f"num_classes={num_classes}, but masks of {name} tell {len(names)} classes apart")
    return Labels(tuple(names), classes | {IGNORED: IGNORED}, colours)


KNOWN_COLOURS = {
    labels.names: labels.colours for labels in (class_labels("cityscapes", 19), class_labels("camvid", len(CAMVID)))
}
"""By the names of the classes."""


def _pairs(files: Files) -> list[tuple[str, str]]:
    """Pair images/NAME.* with masks/NAME.*, in the order of their names."""
    found: dict[str, dict[str, str]] = {"images": {}, "masks": {}}
    for name in files.names():
        top, *rest = PurePosixPath(name).parts
        if top in found and PurePosixPath(name).suffix.lower() in get_img_extensions():
            found[top][str(PurePosixPath(*rest).with_suffix(""))] = name
    images, masks = found["images"], found["masks"]
    if not images:
        raise InputError(f"no images in {files.path}; it needs images/NAME.jpg (or .png, ...) and masks/NAME.png")
    if missing := sorted(images.keys() - masks.keys()):
        raise InputError(
            f"{len(missing)} of {len(images)} images in {files.path} have no mask, {images[missing[0]]} among them; add"
            f" masks/{missing[0]}.png"
        )
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _cityscapes(root: Path, split: str, labels: Labels, channels: int) -> SegmentationDataset:
    part = "val" if split in VALIDATION_NAMES and split != "test" else split
    try:
        found = Cityscapes(str(root), split=part, mode="fine", target_type="semantic")
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"no {part} part of Cityscapes in {root} ({' '.join(str(error).split())}); it needs leftImg8bit/{part} and"
            f" gtFine/{part}"
        ) from None
    paths = sorted(zip(found.images, (mask for (mask,) in found.targets), strict=True))
    if not paths:
        raise InputError(f"no images in {root}/leftImg8bit/{part}")
    missing = [mask for _, mask in paths if not Path(mask).is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(paths)} images have no mask, e.g. no {missing[0]}")
    pairs = [(os.path.relpath(image, root), os.path.relpath(mask, root)) for image, mask in paths]
    return SegmentationDataset(Files(root), pairs, labels, channels)
