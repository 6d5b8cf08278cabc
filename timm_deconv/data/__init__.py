"""Data sets and loaders: timm's and torchvision's, the embedded digits, and images with masks."""

from .datasets import StrictImageDataset, check_labels, chosen_images, class_names, create_dataset
from .device_cache import CachedImages, cached_loader
from .digits import Digits
from .joint_transforms import PaddedBatch, create_joint_transform
from .loaders import as_bytes, create_loader, create_transform
from .sampling import EpochSampler, Seeded
from .segmentation import IGNORED, SEGMENTATION, SegmentationDataset, class_labels, create_segmentation
from .streams import STREAMS, ImageStream, StreamLoader, create_stream
from .unreadable import NO_CLASS, Unreadable

__all__ = [
    "IGNORED",
    "NO_CLASS",
    "SEGMENTATION",
    "STREAMS",
    "CachedImages",
    "Digits",
    "EpochSampler",
    "ImageStream",
    "PaddedBatch",
    "Seeded",
    "SegmentationDataset",
    "StreamLoader",
    "StrictImageDataset",
    "Unreadable",
    "as_bytes",
    "cached_loader",
    "check_labels",
    "chosen_images",
    "class_labels",
    "class_names",
    "create_dataset",
    "create_joint_transform",
    "create_loader",
    "create_segmentation",
    "create_stream",
    "create_transform",
]
