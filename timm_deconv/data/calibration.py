"""Images to calibrate on: of a folder, a tar or the embedded digits, as the network wants them in evaluation."""

from typing import Any

import timm.data
from torch import nn
from torch.utils.data import DataLoader

from .datasets import chosen_images, create_dataset

__all__ = ["calibration_loader"]


def calibration_loader(
    model: nn.Module, data: str, *, images: int = 1024, image_size: int | None = None, batch_size: int = 32
) -> DataLoader:
    """Create a loader of (images (B, C, H, W), targets (B,)), cropped and normalised as the network's settings say.

    Args:
        model: a timm network; its settings are those of `timm.data.resolve_data_config`.
        data: folder or tar with a training part, or `digits`.
        images: how many, drawn at random (always the same ones).
        image_size: height and width, where the network is to be trained at others than its configuration says: the
            statistics of its inputs depend on them.
        batch_size: images a batch.

    Raises:
        InputError: no such data.
    """
    cfg = timm.data.resolve_data_config(model=model)
    channels = cfg["input_size"][0]
    if image_size is not None:
        cfg["input_size"] = (channels, image_size, image_size)
    name, root = ("digits", None) if data == "digits" else ("", data)
    dataset: Any = create_dataset(name, root, "train", channels=channels)
    dataset.transform = timm.data.create_transform(**cfg, is_training=False)
    return DataLoader(chosen_images(dataset, min(images, len(dataset))), batch_size)
