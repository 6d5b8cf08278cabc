"""Pictures of a folder, a tar or the embedded digits, as a network wants them in evaluation."""

from pathlib import Path
from typing import Any

import timm.data
from torch import nn
from torch.utils.data import DataLoader

from timm_deconv.errors import InputError

from .datasets import chosen_images, create_dataset, find_split, image_files
from .images import mode_of

__all__ = ["picture_loader"]


def picture_loader(
    model: nn.Module,
    place: str | Path,
    *,
    split: str = "train",
    images: int | None = None,
    image_size: int | None = None,
    batch_size: int = 32,
) -> DataLoader:
    """Create a loader of (images (B, C, H, W), classes (B,)), cropped and normalised as the network's settings say.

    Args:
        model: a timm network; its settings are those of `timm.data.resolve_data_config`.
        place: folder or tar of images, in folders by class where there are classes; or one that holds a part `split`;
            or the text `digits`.
        split: name of the part, where there are parts.
        images: so many at most, drawn at random (always the same ones); None for all.
        image_size: height and width, where the network is to be trained at others than its configuration says: the
            statistics of its inputs depend on them.
        batch_size: images a batch.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    cfg = timm.data.resolve_data_config(model=model)
    channels = cfg["input_size"][0]
    if image_size is not None:
        cfg["input_size"] = (channels, image_size, image_size)
    dataset: Any = create_dataset("digits", split=split) if place == "digits" else _images(Path(place), split, channels)
    dataset.transform = timm.data.create_transform(**cfg, is_training=False)
    return DataLoader(chosen_images(dataset, images and min(images, len(dataset))), batch_size)


def _images(place: Path, split: str, channels: int) -> Any:
    if not place.exists():
        raise InputError(f"no folder or tar of pictures {place}")
    return image_files(find_split(place, split) or place, mode_of(channels))
