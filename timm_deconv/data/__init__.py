"""Data sets and loaders: timm's and torchvision's, and the embedded digits."""

from .datasets import StrictImageDataset, chosen_images, class_names, create_dataset
from .digits import Digits
from .loaders import create_loader, create_transform

__all__ = [
    "Digits",
    "StrictImageDataset",
    "chosen_images",
    "class_names",
    "create_dataset",
    "create_loader",
    "create_transform",
]
