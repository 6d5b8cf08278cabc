"""Data sets by name: the embedded digits, folders and tars, and everything `timm.data.create_dataset` knows."""

import tarfile
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from timm_deconv.errors import InputError, unknown_name

from .digits import Digits
from .images import UNREADABLE, as_mode, mode_of

TORCHVISION = "cifar10 cifar100 mnist kmnist fashion_mnist qmnist imagenet places365 inaturalist".split()
TRAIN_NAMES = ("train", "training")
# timm knows no 'test' among these; many data sets have only that
VALIDATION_NAMES = ("validation", "val", "valid", "test", "eval")


class StrictImageDataset(timm.data.ImageDataset):
    """timm's data set of image files, which stops at an unreadable image.

    timm's own puts the next image in its place, up to ten times, and logs a warning.

    Raises:
        OSError: an image cannot be read or decoded; names its path and index.
    """

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, target = self.reader[index]
            with file, Image.open(file) as image:
                image = as_mode(image, self.input_img_mode)
        except UNREADABLE as error:
            path = self.filename(index, absolute=True)
            raise OSError(f"unreadable image {path} (index {index}): {error}; replace or remove it") from None
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(target) if self.target_transform else target

    def __del__(self) -> None:
        # timm's reader leaves its tars open for good
        state = getattr(getattr(self, "reader", None), "tar_state", {})
        for tar in state.values() if isinstance(state, dict) else (state,):
            if tar.tf is not None:
                tar.tf.close()


def create_dataset(
    name: str, root: str | None = None, split: str = "train", *, download: bool = False, channels: int = 3
) -> Dataset:
    """Create one split of a data set of (PIL image, class index).

    Args:
        name: `digits`; `torch/cifar10` or another of torchvision; `hfds/...`; or '' for folders and tars.
        root: the data folder; `digits` needs none. Where it holds a folder or tar of the split's name (train/, val/,
            test.tar, ...), that is read whatever the name; else torchvision finds its own layout in it.
        split: train, or validation (also found as val, valid, test, eval), or another folder's name.
        download: let torchvision download into root what is missing.
        channels: 1 or 3; images are converted.

    Raises:
        InputError: an unknown name (with the nearest known ones), no such folder, or no such split in it.
    """
    _check_name(name)
    if name == "digits":
        return Digits(train=split in TRAIN_NAMES)
    if root is None:
        raise InputError(f"data set {name or 'of folders'!r} needs a folder: give --data-dir (or data_dir=...)")
    mode = mode_of(channels)
    if name.startswith("hfds/"):
        return StrictImageDataset(root, reader=name, split=split, input_img_mode=mode)
    if not download and not Path(root).exists():
        raise InputError(f"no data folder {root}; check --data-dir")
    if found := find_split(Path(root), split):
        return _image_files(found, mode)
    if name:
        return _torchvision(name, root, split, download)
    raise InputError(f"no {split} folder or tar in {root}; it needs train and val (or test), as folders or .tar files")


def find_split(root: Path, split: str) -> Path | None:
    """Find the folder or tar of a split in a data folder, or None; a root that is a tar is its own split."""
    if root.suffix == ".tar":
        return root
    names = [split]
    for synonyms in (TRAIN_NAMES, VALIDATION_NAMES):
        if split in synonyms:
            names += synonyms
    candidates = (root / (name + suffix) for name in names for suffix in ("", ".tar"))
    return next((path for path in candidates if path.exists()), None)


def chosen_images(dataset: Dataset, images: int | None) -> Dataset:
    """Choose so many of a data set's images, at random but always the same ones; None for all.

    Raises:
        InputError: there are fewer, or none are asked for.
    """
    if images is None:
        return dataset
    if images < 1:
        raise InputError(f"{images} images asked for: at least one is needed")
    if images > len(dataset):
        raise InputError(f"{images} images asked for, but there are only {len(dataset)}; ask for fewer")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, order[:images].tolist())


def class_names(dataset: Dataset) -> list[str] | None:
    """List the classes in the order of their indices, where the data set knows them."""
    if isinstance(dataset, Digits):
        return [str(digit) for digit in range(10)]
    reader = getattr(dataset, "reader", None)
    indices = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(indices, key=indices.get) if indices else getattr(dataset, "classes", None)


def _check_name(name: str) -> None:
    if name.startswith("hfds/") or name == "":
        return
    if name.split("/")[0] in ("hfids", "tfds", "wds"):
        raise InputError(f"data set {name!r} streams, which has no fixed order to resume; use hfds/, a folder or a tar")
    known = ["digits", *(f"torch/{known}" for known in TORCHVISION)]
    if name not in known:
        raise unknown_name("data set", name, known)


def _image_files(path: Path, mode: str) -> Dataset:
    try:
        return StrictImageDataset(str(path), input_img_mode=mode)
    except (RuntimeError, ValueError, tarfile.TarError) as error:  # timm's readers, where there is nothing to read
        raise InputError(f"no images in {path} ({' '.join(str(error).split())}); it needs CLASS/IMAGE files") from None


def _torchvision(name: str, root: str, split: str, download: bool) -> Dataset:
    # timm counts only its own synonyms as the test part
    part = "train" if split in TRAIN_NAMES else "validation"
    try:
        return timm.data.create_dataset(name, root=root, split=part, download=download)
    except RuntimeError as error:
        hint = "" if download else "; or set dataset_download=true"
        raise InputError(f"data set {name!r} not in {root}: {' '.join(str(error).split())}{hint}") from None
