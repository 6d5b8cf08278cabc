"""The embedded data set: scikit-learn's digits (Alpaydin & Kaynak 1998), 1,797 real grey images of 8x8 pixels.

Enlarged to 32x32 (bilinear), three equal channels. The split is fixed and stratified: of each class, in scikit-learn's
order, every fifth image (the 1st, 6th, 11th, ...) is a test image: 1,433 for training, 364 for testing.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from timm_deconv.errors import needs_extra

SIDE = 32
TEST_EVERY = 5
# over the enlarged training images, values 0..1
MEAN, STD = 0.3057, 0.3237


class Digits(Dataset):
    """PIL images (32x32, RGB) and class indices 0..9.

    Args:
        train: the training part, else the test part.
        transform: applied to each image; timm's loaders set it.
    """

    def __init__(self, train: bool, transform: Callable[[Image.Image], Any] | None = None):
        self.transform = transform
        grey, labels = _load()
        self.targets = labels[_rows(labels, train)]
        self.images = [_enlarge(image) for image in grey[_rows(labels, train)]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return self.transform(image) if self.transform else image, int(self.targets[index])


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    with needs_extra("train"):
        from sklearn.datasets import load_digits  # a second of imports that only this data set needs

    digits = load_digits()
    return digits.images, digits.target


def _rows(labels: np.ndarray, train: bool) -> np.ndarray:
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[::TEST_EVERY]] = True
    return np.flatnonzero(is_test != train)


def _enlarge(grey: np.ndarray) -> Image.Image:
    image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB")
