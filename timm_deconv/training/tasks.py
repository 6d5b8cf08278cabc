"""What a training run is about: its data, its loss, its figures. The loop knows only the protocol."""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_deconv import data
from timm_deconv.convert import calibrate
from timm_deconv.errors import InputError
from timm_deconv.linalg import to_double

from .network import create_model
from .recipe import Recipe

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) of bytes, and their targets: (B,) class indices in classification."""


class Task(Protocol):
    """What the loop asks of a task. Figures of a batch are (B, columns): they add over batches and processes."""

    columns: tuple[str, ...]
    headline: str

    def create_model(self) -> nn.Module:
        """Create a fresh network."""

    def create_loaders(self) -> tuple[DataLoader, DataLoader]:
        """Create the training and evaluation loaders, of whole batches over all processes.

        The training loader's `batch_sampler` is an `EpochSampler`: the loop says from where, and for which process.
        """

    def calibrate(self, model: nn.Module) -> None:
        """Calibrate the network by training images before the first step, where the recipe says so."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss (a scalar with a graph) and the figures (B, columns) without one."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the figures (B, columns) of a batch."""

    def summarise(self, total: Tensor, images: int) -> Mapping[str, float]:
        """Turn figures (columns,), added up over `images`, into named numbers, `loss` and the headline among them."""


class Classification:
    """Cross entropy, top-1 and top-5 accuracy; a `Task`.

    Args:
        recipe: the settings.
        device: where images are normalised.
    """

    columns = ("loss", "top1", "top5")
    headline = "top1"

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.normalise = Normalise(recipe, device)

    def create_model(self) -> nn.Module:
        """Create the recipe's network; see `network.create_model`."""
        return create_model(self.recipe)

    def create_loaders(self) -> tuple[DataLoader, DataLoader]:
        """Create the training and evaluation loaders.

        Raises:
            InputError: the data cannot be had, or the two parts and the recipe differ in their classes.
        """
        recipe = self.recipe
        train, val = self._dataset(recipe.train_split), self._dataset(recipe.val_split)
        _check_classes(train, val, recipe.num_classes)
        train, val = data.chosen_images(train, recipe.train_images), data.chosen_images(val, recipe.val_images)
        return self._loader(train, training=True), self._loader(val, training=False)

    def evaluation_loader(self) -> DataLoader:
        """Create the loader of the evaluation split alone.

        Raises:
            InputError: the images have other classes than the network.
        """
        images = self._dataset(self.recipe.val_split)
        names = data.class_names(images)
        if names is not None and len(names) != self.recipe.num_classes:
            raise InputError(
                f"the network has {self.recipe.num_classes} classes, the images of"
                f" {self.recipe.data_dir or self.recipe.dataset} have {len(names)}"
            )
        return self._loader(data.chosen_images(images, self.recipe.val_images), training=False)

    def calibrate(self, model: nn.Module) -> None:
        """Calibrate the network by `calibration_images` of the training images; see `timm_deconv.calibrate`."""
        recipe = self.recipe
        if not recipe.calibration_images:
            return
        train = data.chosen_images(self._dataset(recipe.train_split), recipe.train_images)
        images = data.chosen_images(train, min(recipe.calibration_images, len(train)))
        calibrate(model, (self.normalise(batch.to(self.device)) for batch, _ in self._loader(images, training=False)))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean smoothed cross entropy (a scalar) and the figures (B, 3)."""
        images, target = batch
        output = model(self.normalise(images))
        losses = F.cross_entropy(output.float(), target, reduction="none", label_smoothing=self.recipe.smoothing)
        return losses.mean(), _figures(losses.detach(), output.detach(), target)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the figures (B, 3): cross entropy without smoothing, 1 where top-1 is right, 1 where top-5 is."""
        images, target = batch
        output = model(self.normalise(images))
        return _figures(F.cross_entropy(output.float(), target, reduction="none"), output, target)

    def summarise(self, total: Tensor, images: int) -> Mapping[str, float]:
        """Turn the sums (3,) over `images` into a mean loss and percentages."""
        loss, top1, top5 = (to_double(total) / images).tolist()
        return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}

    def _dataset(self, split: str) -> Dataset:
        recipe = self.recipe
        channels = recipe.input_size[0]
        return data.create_dataset(
            recipe.dataset, recipe.data_dir, split, download=recipe.dataset_download, channels=channels
        )

    def _loader(self, dataset: Dataset, training: bool) -> DataLoader:
        recipe = self.recipe
        transform = data.create_transform(
            recipe.input_size,
            augmentation=recipe.augmentation if training else "none",
            crop_padding=recipe.crop_padding,
            scale=recipe.scale,
            hflip=recipe.hflip,
            crop_pct=1.0 if training else recipe.crop_pct,
            interpolation=recipe.interpolation,
        )
        return data.create_loader(
            dataset,
            transform,
            batch_size=recipe.batch_size,
            training=training,
            workers=recipe.workers,
            pin_memory=torch.cuda.is_available(),
            seed=recipe.seed,
        )


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


def _figures(losses: Tensor, output: Tensor, target: Tensor) -> Tensor:
    best = output.topk(min(5, output.shape[1]), dim=1).indices == target[:, None]
    return torch.stack([losses.float(), best[:, 0].float(), best.any(dim=1).float()], dim=1)


def _check_classes(train: Dataset, val: Dataset, num_classes: int) -> None:
    names, val_names = data.class_names(train), data.class_names(val)
    if names is not None and len(names) != num_classes:
        raise InputError(f"num_classes={num_classes}, but the training images have {len(names)} classes")
    if names != val_names:
        differing = sorted(set(names or ()) ^ set(val_names or ())) or ["their order"]
        raise InputError(f"training and evaluation images differ in their classes: {', '.join(differing[:5])}")
