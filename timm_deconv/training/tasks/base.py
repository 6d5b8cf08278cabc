"""What a training run is about: its data, its loss, its figures. The loop knows only the protocol `Task`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_deconv import data
from timm_deconv.convert import calibrate
from timm_deconv.training.network import create_model
from timm_deconv.training.recipe import Recipe

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) of bytes, and their targets: class indices, (B,) in classification, (B, H, W) in segmentation."""


NOT_COUNTED = -1.0
"""First of the figures of an image that does not count, as it could not be read or has no labels."""


class Task(Protocol):
    """What the loop asks of a task.

    Figures of a batch are (B, columns): they add over batches and processes, but for images that are NOT_COUNTED.
    `class_names`, where they are known once the loaders are made, are saved with the network.
    """

    columns: tuple[str, ...]
    headline: str
    class_names: list[str] | None

    def create_model(self) -> nn.Module:
        """Create a fresh network."""

    def create_loaders(self) -> tuple[DataLoader, DataLoader]:
        """Create the training and evaluation loaders, of whole batches over all processes.

        The training loader's `batch_sampler` is an `EpochSampler`, or like one: the loop says from where, and for which
        process.
        """

    def calibrate(self, model: nn.Module) -> None:
        """Calibrate the network by training images before the first step, where the recipe says so."""

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for the training steps of an epoch, counted from 0."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss (a scalar with a graph) and the figures (B, columns) without one."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the figures (B, columns) of a batch."""

    def summarise(self, total: Tensor, images: int) -> Mapping[str, float]:
        """Turn figures (columns,), added up over `images`, into named numbers, `loss` and the headline among them."""


class RecipeTask(ABC):
    """What the tasks have in common: a `Task` of a recipe's network and data set.

    Args:
        recipe: the settings.
        device: where images are normalised.

    Attributes:
        class_names: in the order of their indices; None where the data set does not know them, or was not asked yet.
    """

    columns: tuple[str, ...]
    headline: str

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.class_names: list[str] | None = None
        self.normalise = Normalise(recipe, device)
        self.epoch = 0

    def create_model(self) -> nn.Module:
        """Create the recipe's network; see `network.create_model`."""
        return create_model(self.recipe)

    def create_loaders(self) -> tuple[DataLoader, DataLoader]:
        """Create the training and evaluation loaders.

        Raises:
            InputError: the data cannot be had, or does not fit the recipe.
        """
        recipe = self.recipe
        train, val = self.dataset(recipe.train_split), self.dataset(recipe.val_split)
        self.check(train, val)
        train, val = data.chosen_images(train, recipe.train_images), data.chosen_images(val, recipe.val_images)
        return self.loader(train, training=True), self.loader(val, training=False)

    def evaluation_loader(self) -> DataLoader:
        """Create the loader of the evaluation split alone.

        Raises:
            InputError: the images have other classes than the network.
        """
        images = self.dataset(self.recipe.val_split)
        self.check_evaluation(images)
        return self.loader(data.chosen_images(images, self.recipe.val_images), training=False)

    def calibrate(self, model: nn.Module) -> None:
        """Calibrate the network by `calibration_images` of the training images; see `timm_deconv.calibrate`."""
        recipe = self.recipe
        if not recipe.calibration_images:
            return
        train = data.chosen_images(self.dataset(recipe.train_split), recipe.train_images)
        images = data.chosen_images(train, min(recipe.calibration_images, len(train)))
        batches = self.loader(images, training=False)
        calibrate(self.pretrained_part(model), (self.normalise(batch.to(self.device)) for batch, _ in batches))

    def begin_epoch(self, epoch: int) -> None:
        """Note the epoch, which the size of training images may depend on."""
        self.epoch = epoch

    def pretrained_part(self, model: nn.Module) -> nn.Module:
        """Return the part of the network whose function is kept in calibration."""
        return model

    @abstractmethod
    def dataset(self, split: str) -> Dataset:
        """Create one split of the recipe's data set."""

    @abstractmethod
    def loader(self, dataset: Dataset, training: bool) -> DataLoader:
        """Create a loader of `Batch`es."""

    @abstractmethod
    def check(self, train: Dataset, val: Dataset) -> None:
        """Check that both parts fit each other and the recipe."""

    @abstractmethod
    def check_evaluation(self, val: Dataset) -> None:
        """Check that the images fit the network."""

    @abstractmethod
    def said(self, figures: Mapping[str, float]) -> str:
        """Say in a line's beginning what `summarise` has found."""

    @abstractmethod
    def drawn(self, model: nn.Module, batch: Batch) -> list[Image.Image]:
        """Draw what the network says of each image over it."""


class Normalise:
    """Images of bytes (B, C, H, W) to float32 of zero mean and unit deviation, by the recipe's `mean` and `std`.

    Args:
        recipe: says mean, deviation and memory format.
        device: where the images are.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        self.mean, self.std = (
            torch.tensor(value, device=device).view(1, -1, 1, 1) * 255 for value in (recipe.mean, recipe.std)
        )
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=self.memory_format)
