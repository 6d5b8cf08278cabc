"""Classification: one class for each image."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from timm_deconv import data
from timm_deconv.data import NO_CLASS
from timm_deconv.data.drawing import captioned
from timm_deconv.errors import InputError
from timm_deconv.linalg import to_double
from timm_deconv.training.recipe import Recipe

from .base import NOT_COUNTED, Batch, RecipeTask


class Classification(RecipeTask):
    """Cross entropy, top-1 and top-5 accuracy; a `Task`.

    Raises:
        InputError: the recipe has an augmentation that is for images with masks.
    """

    columns = ("loss", "top1", "top5")
    headline = "top1"

    def __init__(self, recipe: Recipe, device: torch.device):
        super().__init__(recipe, device)
        self.mixup: Mixup | None = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=recipe.num_classes
            )
        if recipe.augmentation == "scale_crop":
            raise InputError("augmentation='scale_crop' is for masks; pad_crop, rrc and none are for classes")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean smoothed cross entropy (a scalar) and the figures (B, 3)."""
        images, target = batch
        pixels, expected = self._mixed(self._resized(self.normalise(images)), target)
        output = model(pixels)
        smoothing = 0.0 if self.mixup else self.recipe.smoothing  # which mixed classes have already
        losses = F.cross_entropy(output.float(), expected, reduction="none", label_smoothing=smoothing)
        return losses.mean(), _figures(losses.detach(), output.detach(), target)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the figures (B, 3): cross entropy without smoothing, 1 where top-1 is right, 1 where top-5 is."""
        images, target = batch
        output = model(self.normalise(images))
        losses = F.cross_entropy(output.float(), target, reduction="none", ignore_index=NO_CLASS)
        return _figures(torch.where(target == NO_CLASS, NOT_COUNTED, losses), output, target)

    def summarise(self, total: Tensor, images: int) -> Mapping[str, float]:
        """Turn the sums (3,) over `images` into a mean loss and percentages."""
        loss, top1, top5 = (to_double(total) / images).tolist()
        return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}

    def _resized(self, pixels: Tensor) -> Tensor:
        """Resize training images to what is due in this epoch."""
        sizes, (_, height, width) = self.recipe.progressive_sizes, self.recipe.input_size
        due = sizes[self.epoch * len(sizes) // self.recipe.epochs] if sizes else height
        if due == height:
            return pixels
        return F.interpolate(pixels, (due, round(width * due / height)), mode="bilinear", antialias=True)

    def _mixed(self, pixels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix training images, and their classes into shares (B, num_classes)."""
        if self.mixup is None:
            return pixels, target
        if len(pixels) % 2:
            raise InputError(f"{len(pixels)} images a process: mixup and cutmix pair them; make them even")
        return self.mixup(pixels, target)

    def said(self, figures: Mapping[str, float]) -> str:
        """Say both accuracies."""
        return f"top-1 {figures['top1']:.3f} %, top-5 {figures['top5']:.3f} %"

    def drawn(self, model: nn.Module, batch: Batch) -> list[Image.Image]:
        """Write under each image which class it was taken for, how surely, and which it is where that is another."""
        images, target = batch
        shares, named = model(self.normalise(images)).softmax(1).max(1)
        names = self.class_names or [str(index) for index in range(self.recipe.num_classes)]
        captions = (
            f"{names[guess]}, {share:.0%}" + ("" if true in (guess, NO_CLASS) else f" (is {names[true]})")
            for share, guess, true in zip(shares.tolist(), named.tolist(), target.tolist(), strict=True)
        )
        pictures = map(to_pil_image, images.cpu())
        return [captioned(picture, [caption]) for picture, caption in zip(pictures, captions, strict=True)]

    def check(self, train: Dataset, val: Dataset) -> None:
        """Check that training and evaluation images have the recipe's number of classes, and the same."""
        names, val_names = data.class_names(train), data.class_names(val)
        if names is not None and len(names) != self.recipe.num_classes:
            raise InputError(
                f"num_classes={self.recipe.num_classes}, but the training images have {len(names)} classes"
            )
        if names != val_names:
            differing = sorted(set(names or ()) ^ set(val_names or ())) or ["their order"]
            raise InputError(f"training and evaluation images differ in their classes: {', '.join(differing[:5])}")
        for part in (train, val):
            data.check_labels(part, self.recipe.num_classes)
        self.class_names = names

    def check_evaluation(self, val: Dataset) -> None:
        """Check that the images have as many classes as the network."""
        recipe, names = self.recipe, data.class_names(val)
        if names is not None and len(names) != recipe.num_classes:
            raise InputError(
                f"the network has {recipe.num_classes} classes, the images of {recipe.data_dir or recipe.dataset} have"
                f" {len(names)}"
            )
        data.check_labels(val, recipe.num_classes)
        self.class_names = names

    def dataset(self, split: str) -> Dataset:
        """Create one split, of images and class indices."""
        recipe, training = self.recipe, split == self.recipe.train_split
        keys: dict[str, Any] = {"input_key": recipe.input_key, "target_key": recipe.target_key}
        keys["channels"] = recipe.input_size[0]
        if recipe.dataset.startswith(data.STREAMS):
            chosen = {"num_classes": recipe.num_classes, "training": training, "seed": recipe.seed}
            stream = data.create_stream(recipe.dataset, recipe.data_dir, split, **chosen, **keys)
            stream.max_unreadable = recipe.max_unreadable
            return stream
        dataset = data.create_dataset(recipe.dataset, recipe.data_dir, split, download=recipe.dataset_download, **keys)
        if isinstance(dataset, data.StrictImageDataset):
            dataset.unreadable = data.Unreadable(recipe.max_unreadable, replaced=training)
        return dataset

    def loader(self, dataset: Dataset, training: bool) -> DataLoader:
        """Create a loader, with the recipe's augmentation in training."""
        recipe = self.recipe
        transform = data.create_transform(
            recipe.input_size,
            augmentation=recipe.augmentation if training else "none",
            aa=recipe.aa if training else None,
            mean=recipe.mean,
            crop_padding=recipe.crop_padding,
            scale=recipe.scale,
            hflip=recipe.hflip,
            crop_pct=1.0 if training else recipe.crop_pct,
            interpolation=recipe.interpolation,
        )
        settings: dict[str, Any] = {
            "batch_size": recipe.batch_size,
            "training": training,
            "workers": recipe.workers,
            "seed": recipe.seed,
        }
        if not recipe.cache:
            return data.create_loader(dataset, transform, **settings, pin_memory=torch.cuda.is_available())
        settings["device"] = self.device
        if not training or recipe.augmentation == "none":
            return data.cached_loader(dataset, transform, **settings)
        crop = {"crop": recipe.input_size[1:], "crop_padding": recipe.crop_padding, "hflip": recipe.hflip}
        return data.cached_loader(dataset, data.as_bytes(recipe.input_size[0]), **settings, **crop)


def _figures(losses: Tensor, output: Tensor, target: Tensor) -> Tensor:
    best = output.topk(min(5, output.shape[1]), dim=1).indices == target[:, None]
    return torch.stack([losses.float(), best[:, 0].float(), best.any(dim=1).float()], dim=1)
