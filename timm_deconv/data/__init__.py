"""Data sets and loaders: timm's and torchvision's, and the embedded digits."""

from .datasets import StrictImageDataset, chosen_images, class_names, create_dataset
from .digits import Digits
from .loaders import create_loader, create_transform
from .sampling import EpochSampler, Seeded

__all__ = [
    "Digits",
    "EpochSampler",
    "Seeded",
    "StrictImageDataset",
    "chosen_images",
    "class_names",
    "create_dataset",
    "create_loader",
    "create_transform",
]
