"""Real pictures with labels, to count how many an exported network names rightly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_deconv.data import class_names
from timm_deconv.data.evaluation import picture_loader
from timm_deconv.errors import InputError

__all__ = ["labelled_pictures", "top1"]


def labelled_pictures(model: nn.Module, place: str | Path, images: int | None = None) -> DataLoader:
    """Create a loader as `picture_loader` does, of the part for evaluation, with the network's own classes.

    Raises:
        InputError: as `picture_loader`; or folders that are not named by the network's classes.
    """
    loader = picture_loader(model, place, split="validation", images=images)
    dataset: Any = getattr(loader.dataset, "dataset", loader.dataset)
    dataset.target_transform = _numbers(model, class_names(dataset) or [], place).__getitem__
    return loader


def _numbers(model: Any, folders: list[str], place: str | Path) -> list[int]:
    """Return the network's class for each folder: by name; by order where no name is known and there are as many."""
    number = getattr(model, "num_classes", None)
    names = list(model.pretrained_cfg.get("label_names") or (ImageNetInfo().label_names() if number == 1000 else ()))
    unknown = [name for name in folders if name not in names]
    if unknown == folders and len(folders) == number:
        return list(range(number))
    if unknown:
        raise InputError(
            f"{place} has {len(folders)} folders and the network {number} classes: {unknown[0]!r} is the name of none;"
            " give pictures in a folder for each class"
        )
    return [names.index(name) for name in folders]


def top1(run: Callable[[Tensor], Tensor], pictures: DataLoader) -> float:
    """Return the share of labelled pictures, given one by one, whose class is named rightly, in %."""
    right = seen = 0
    with torch.inference_mode():
        for images, classes in pictures:
            named = torch.cat([run(image) for image in images.split(1)]).argmax(1)
            right += int((named == classes).sum())
            seen += len(classes)
    return 100 * right / seen
