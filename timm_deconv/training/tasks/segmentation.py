"""Segmentation: a class for each pixel."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.classification import multiclass_confusion_matrix

from timm_deconv import data
from timm_deconv.data import IGNORED, SegmentationDataset
from timm_deconv.data.drawing import coloured
from timm_deconv.errors import InputError
from timm_deconv.models.segmenter import Segmenter
from timm_deconv.training.network import create_segmentation_model
from timm_deconv.training.recipe import Recipe

from .base import NOT_COUNTED, Batch, RecipeTask

FOR_CLASSES = ("pad_crop", "rrc")


class IntersectionOverUnion(MulticlassJaccardIndex):
    """torchmetrics' measure of a confusion matrix that has been counted already."""

    def update(self, confusion: Tensor) -> None:  # type: ignore[override]
        """Add a confusion matrix (classes, classes): rows are the true classes."""
        self.confmat += confusion.to(self.confmat)


class Segmentation(RecipeTask):
    """Cross entropy of labelled pixels, mean intersection over union and pixel accuracy; a `Task`.

    A batch is images (B, C, H, W) and masks (B, H, W), both of bytes. Figures of an image are its loss and its
    confusion matrix, so that measures are those of one matrix over all images and processes. Where the network has an
    auxiliary head its loss is added, times `aux_weight`.

    Raises:
        InputError: the recipe has a setting that is for classification.
    """

    headline = "miou"

    def __init__(self, recipe: Recipe, device: torch.device):
        super().__init__(recipe, device)
        if recipe.augmentation in FOR_CLASSES:
            raise InputError(f"augmentation={recipe.augmentation!r} is for classes; scale_crop and none are for masks")
        for setting in ("mixup", "cutmix", "progressive_sizes", "cache"):
            if value := getattr(recipe, setting):
                raise InputError(f"{setting}={value} is for classes, not for masks; leave it out")
        classes = range(recipe.num_classes)
        self.columns = ("loss", *(f"{true} as {named}" for true in classes for named in classes))
        self.labels = data.class_labels(recipe.dataset, recipe.num_classes)
        self.class_names = list(self.labels.names)

    def create_model(self) -> nn.Module:
        """Create the recipe's network; see `network.create_segmentation_model`."""
        return create_segmentation_model(self.recipe)

    def pretrained_part(self, model: nn.Module) -> nn.Module:
        """Return the encoder where the head is new and has no function to keep."""
        return model.encoder if isinstance(model, Segmenter) else model

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of labelled pixels (a scalar) and the figures (B, columns)."""
        images, masks = batch
        output = model(self.normalise(images))
        logits, *auxiliary = output if isinstance(output, tuple) else (output,)
        loss = self._cross_entropy(logits, masks)
        for each in auxiliary:
            loss = loss + self.recipe.aux_weight * self._cross_entropy(each, masks)
        return loss, self._figures(loss.detach().expand(len(masks)), logits.detach(), masks)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the figures (B, columns): each image's mean cross entropy without smoothing, and confusion matrix."""
        images, masks = batch
        logits = model(self.normalise(images))
        losses = F.cross_entropy(logits.float(), masks.long(), ignore_index=IGNORED, reduction="none")
        labelled = (masks != IGNORED).flatten(1).sum(1)
        means = losses.flatten(1).sum(1) / labelled.clamp(min=1)
        return self._figures(torch.where(labelled == 0, NOT_COUNTED, means), logits, masks)

    def summarise(self, total: Tensor, images: int) -> Mapping[str, float]:
        """Turn the sums (columns,) over `images` into a mean loss and percentages; `iou_NAME` is a class's.

        Classes that are neither in the masks nor named anywhere are left out of the mean.
        """
        confusion = total[1:].reshape(self.recipe.num_classes, -1)
        mean, classes = (self._intersection_over_union(confusion, average) for average in ("macro", "none"))
        accuracy = 100 * confusion.diagonal().sum() / confusion.sum().clamp(min=1)
        figures = {"loss": total[0].item() / images, "miou": mean.item(), "accuracy": accuracy.item()}
        named = zip(self.labels.names, classes.tolist(), strict=True)
        return figures | {f"iou_{name}": value for name, value in named}

    def said(self, figures: Mapping[str, float]) -> str:
        """Say the mean intersection over union and the pixel accuracy."""
        return f"mean IoU {figures['miou']:.3f} %, pixel accuracy {figures['accuracy']:.3f} %"

    def drawn(self, model: nn.Module, batch: Batch) -> list[Image.Image]:
        """Lay the class of each pixel over each image, in the data set's colours where it has some."""
        images, _ = batch
        named = model(self.normalise(images)).argmax(1).cpu()
        return [
            coloured(image, classes, self.recipe.num_classes, self.labels.colours)
            for image, classes in zip(images.cpu(), named, strict=True)
        ]

    def check(self, train: Dataset, val: Dataset) -> None:
        """Read the masks of both parts, so that what is wrong with one is said before an epoch is lost."""
        for part in (train, val):
            self.check_evaluation(part)

    def check_evaluation(self, val: Dataset) -> None:
        """Read the masks."""
        assert isinstance(val, SegmentationDataset)
        val.check()

    def dataset(self, split: str) -> SegmentationDataset:
        """Create one split, of images and masks."""
        recipe = self.recipe
        dataset = data.create_segmentation(
            recipe.dataset, recipe.data_dir, split, recipe.num_classes, channels=recipe.input_size[0]
        )
        dataset.unreadable = data.Unreadable(recipe.max_unreadable, replaced=split == recipe.train_split)
        return dataset

    def loader(self, dataset: Dataset, training: bool) -> DataLoader:
        """Create a loader, with the recipe's augmentation in training."""
        recipe = self.recipe
        transform = data.create_joint_transform(
            recipe.input_size,
            training=training,
            augmentation=recipe.augmentation,
            scale=recipe.scale,
            hflip=recipe.hflip,
            crop_pct=recipe.crop_pct,
            interpolation=recipe.interpolation,
            mean=recipe.mean,
        )
        return data.create_loader(
            dataset,
            transform,
            batch_size=recipe.batch_size,
            training=training,
            workers=recipe.workers,
            pin_memory=torch.cuda.is_available(),
            seed=recipe.seed,
            collate=data.PaddedBatch(recipe.mean),
        )

    def _intersection_over_union(self, confusion: Tensor, average: Literal["macro", "none"]) -> Tensor:
        metric = IntersectionOverUnion(len(confusion), average=average).to(confusion.device)
        metric.update(confusion)
        return 100 * metric.compute()

    def _cross_entropy(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Average over labelled pixels, in training those of all processes."""
        total = F.cross_entropy(
            logits.float(),
            masks.long(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.recipe.smoothing,
        )
        labelled = (masks != IGNORED).sum().float()
        # gradients are averaged over processes, which have labelled pixels in different numbers; a batch that is only
        # looked at again has none
        if torch.is_grad_enabled() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(labelled)
            labelled /= torch.distributed.get_world_size()
        return total / labelled.clamp(min=1e-3)

    def _figures(self, losses: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
        named, classes = logits.argmax(1), self.recipe.num_classes
        counts = [
            multiclass_confusion_matrix(guess, mask.long(), classes, ignore_index=IGNORED, validate_args=False)
            for guess, mask in zip(named, masks, strict=True)
        ]
        return torch.cat([losses.float()[:, None], torch.stack(counts).flatten(1).float()], 1)
