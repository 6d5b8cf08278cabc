"""Data sets and loaders: timm's and torchvision's, the embedded digits, and images with masks."""

from .datasets import StrictImageDataset, chosen_images, class_names, create_dataset
from .digits import Digits
from .joint_transforms import PaddedBatch, create_joint_transform
from .loaders import create_loader, create_transform
from .segmentation import IGNORED, SEGMENTATION, SegmentationDataset, class_labels, create_segmentation

__all__ = [
    "IGNORED",
    "SEGMENTATION",
    "Digits",
    "PaddedBatch",
    "SegmentationDataset",
    "StrictImageDataset",
    "chosen_images",
    "class_labels",
    "class_names",
    "create_dataset",
    "create_joint_transform",
    "create_loader",
    "create_segmentation",
    "create_transform",
]
