"""Data sets by name: the embedded digits, folders and tars, and everything `timm.data.create_dataset` knows."""

import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm.data
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from timm_deconv.errors import InputError, needs_extra, unknown_name

from .digits import Digits
from .images import as_mode, mode_of
from .unreadable import NO_CLASS, Unreadable

T = TypeVar("T")
TORCHVISION = "cifar10 cifar100 mnist kmnist fashion_mnist qmnist imagenet places365 inaturalist".split()
HUB = ("hfds/", "hfids/", "wds/")
"""Starts of names of data sets that timm reads by other packages; the last two are streams."""

TRAIN_NAMES = ("train", "training")
# timm knows no 'test' among these; many data sets have only that
VALIDATION_NAMES = ("validation", "val", "valid", "test", "eval")


class StrictImageDataset(timm.data.ImageDataset):
    """timm's data set of image files, which stops at an unreadable image, or leaves out so many.

    timm's own puts the next image in its place, up to ten times, and logs a warning.

    Attributes:
        unreadable: what is done about such images; by default the run stops.

    Raises:
        OSError: an image cannot be read or decoded; names its path and index.
    """

    unreadable = Unreadable()

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.unreadable.readable(self._read, index, len(self), self._place, self._empty)
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(target) if self.target_transform and target != NO_CLASS else target

    def _read(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file, Image.open(file) as image:
            return as_mode(image, self.input_img_mode), target

    def _place(self, index: int) -> str:
        return str(self.filename(index, absolute=True))

    def _empty(self) -> tuple[Image.Image, int]:
        return Image.new(self.input_img_mode, (1, 1)), NO_CLASS

    def __del__(self) -> None:
        # timm's reader leaves its tars open for good
        state = getattr(getattr(self, "reader", None), "tar_state", {})
        for tar in state.values() if isinstance(state, dict) else (state,):
            if tar.tf is not None:
                tar.tf.close()


def create_dataset(
    name: str,
    root: str | None = None,
    split: str = "train",
    *,
    download: bool = False,
    channels: int = 3,
    input_key: str | None = None,
    target_key: str | None = None,
) -> Dataset:
    """Create one split of a data set of (PIL image, class index) that has an order; others see `create_stream`.

    Args:
        name: `digits`; `torch/cifar10` or another of torchvision; `hfds/NAME` of the Hub or `hfds/FOLDER` of parquet
            files and the like; or '' for folders and tars.
        root: the data folder, of `hfds` the cache; `digits` needs none. Where it holds a folder or tar of the split's
            name (train/, val/, test.tar, ...), that is read whatever the name; else torchvision finds its own layout in
            it.
        split: train, or validation (also found as val, valid, test, eval), or another folder's name.
        download: let torchvision download into root what is missing.
        channels: 1 or 3; images are converted.
        input_key, target_key: columns of images and classes, of `hfds`; by default image and label.

    Raises:
        InputError: an unknown name (with the nearest known ones), no such folder, or no such split in it.
    """
    _check_name(name)
    if name == "digits":
        return Digits(train=split in TRAIN_NAMES)
    if name.startswith("hfds/"):
        return _hub_rows(name, root, split, channels, input_key, target_key)
    if root is None:
        raise InputError(f"data set {name or 'of folders'!r} needs a folder: give --data-dir (or data_dir=...)")
    mode = mode_of(channels)
    if not download and not Path(root).exists():
        raise InputError(f"no data folder {root}; check --data-dir")
    if found := find_split(Path(root), split):
        return image_files(found, mode)
    if name:
        return _torchvision(name, root, split, download)
    raise InputError(f"no {split} folder or tar in {root}; it needs train and val (or test), as folders or .tar files")


def find_split(root: Path, split: str) -> Path | None:
    """Find the folder or tar of a split in a data folder, or None; a root that is a tar is its own split."""
    if root.suffix == ".tar":
        return root
    candidates = (root / (name + suffix) for name in split_names(split) for suffix in ("", ".tar"))
    return next((path for path in candidates if path.exists()), None)


def split_names(split: str) -> list[str]:
    """List the names by which a split may be found, its own first."""
    synonyms = [name for names in (TRAIN_NAMES, VALIDATION_NAMES) if split in names for name in names]
    return list(dict.fromkeys([split, *synonyms]))


def chosen_images(dataset: Dataset, images: int | None) -> Dataset:
    """Choose so many of a data set's images, at random but always the same ones, of a stream the first; None for all.

    Raises:
        InputError: there are fewer, or none are asked for.
    """
    if images is None:
        return dataset
    if images < 1:
        raise InputError(f"{images} images asked for: at least one is needed")
    if images > len(dataset):
        raise InputError(f"{images} images asked for, but there are only {len(dataset)}; ask for fewer")
    if isinstance(dataset, IterableDataset):
        return dataset.first(images)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, order[:images].tolist())


def class_names(dataset: Dataset) -> list[str] | None:
    """List the classes in the order of their indices, where the data set knows them."""
    if isinstance(dataset, Digits):
        return [str(digit) for digit in range(10)]
    reader = getattr(dataset, "reader", None)
    indices = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    names = sorted(indices, key=indices.get) if indices else getattr(dataset, "classes", None)
    return None if names is None else [", ".join(each) if isinstance(each, tuple) else each for each in names]


def _check_name(name: str) -> None:
    if name.startswith("hfds/") or name == "":
        return
    known = ["digits", *(f"torch/{known}" for known in TORCHVISION), *(f"{prefix}NAME" for prefix in HUB)]
    if name not in known:
        raise unknown_name("data set", name, known)


def image_files(path: Path, mode: str) -> Dataset:
    """Create a data set of the images in a folder or tar, of a mode of PIL's.

    Raises:
        InputError: there are none.
    """
    try:
        return StrictImageDataset(str(path), input_img_mode=mode)
    except (RuntimeError, ValueError, tarfile.TarError) as error:  # timm's readers, where there is nothing to read
        reason = " ".join(str(error).split())
        raise InputError(f"no images in {path} ({reason}); it needs image files, to train on CLASS/IMAGE") from None


def _hub_rows(
    name: str, root: str | None, split: str, channels: int, input_key: str | None, target_key: str | None
) -> Dataset:
    with needs_extra("hfds"):
        import datasets  # noqa: F401 - timm's reader prints of it where it is missing
    keys = {key: value for key, value in (("input_key", input_key), ("target_key", target_key)) if value}
    settings = {"reader": name, "input_img_mode": mode_of(channels)}
    dataset = first_split(name, split, lambda part: StrictImageDataset(root, split=part, **settings, **keys))
    columns = dataset.reader.dataset.column_names
    if dataset.reader.label_key not in columns:
        raise InputError(
            f"{name} has no column {dataset.reader.label_key!r} of classes, but {', '.join(columns)}; set target_key"
        )
    return dataset


def first_split(name: str, split: str, create: Callable[[str], T]) -> T:
    """Create the split of a data set of timm's, or a synonym where it has none of that name.

    Raises:
        InputError: it cannot be had by any name; why not by the first is said.
    """
    reasons = []
    for part in split_names(split):
        try:
            return create(part)
        except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
            reasons.append(textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ..."))
    raise InputError(f"split {split!r} of data set {name!r} cannot be had: {reasons[0]}")


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Check the class of every image where the data set holds them beside the images.

    Raises:
        InputError: one is no class of the network, as the -1 is by which parts without labels are published.
    """
    reader, labels = getattr(dataset, "reader", None), getattr(dataset, "targets", None)
    if getattr(reader, "label_key", None) is not None:
        labels = reader.dataset.with_format("numpy")[reader.label_key][:]
    if labels is None or not len(labels):
        return
    numbers = np.asarray(labels)
    if numbers.dtype.kind not in "iu":
        raise InputError(f"classes such as {numbers[0].item()!r}: they need to be whole numbers from 0")
    if (wrong := np.flatnonzero((numbers < 0) | (numbers >= num_classes))).size:
        raise InputError(unknown_label(int(numbers[wrong[0]]), num_classes, f" of image {wrong[0]}"))


def unknown_label(label: int, num_classes: int, where: str = "") -> str:
    """Say that a number is no class."""
    return f"class {label}{where}: the network has the classes 0 to {num_classes - 1}; check num_classes and the data"


def _torchvision(name: str, root: str, split: str, download: bool) -> Dataset:
    # timm counts only its own synonyms as the test part
    part = "train" if split in TRAIN_NAMES else "validation"
    try:
        return timm.data.create_dataset(name, root=root, split=part, download=download)
    except RuntimeError as error:
        hint = "" if download else "; or set dataset_download=true"
        raise InputError(f"data set {name!r} not in {root}: {' '.join(str(error).split())}{hint}") from None
