"""Data sets and loaders: timm's and torchvision's, and the embedded digits."""

from timm_deconv.data.datasets import StrictImageDataset, class_names, create_dataset
from timm_deconv.data.digits import Digits
from timm_deconv.data.loaders import create_loader, create_transform

__all__ = ["Digits", "StrictImageDataset", "class_names", "create_dataset", "create_loader", "create_transform"]
