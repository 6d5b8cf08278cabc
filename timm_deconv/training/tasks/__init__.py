"""The tasks: what a training run is about. `create_task` makes the one that the recipe's data set is for."""

import torch

from timm_deconv.data import SEGMENTATION
from timm_deconv.training.recipe import Recipe

from .base import Batch, RecipeTask, Task
from .classification import Classification

__all__ = ["Batch", "Classification", "RecipeTask", "Task", "create_task"]


def create_task(recipe: Recipe, device: torch.device) -> RecipeTask:
    """Create the task of a recipe: segmentation where its data set has masks, else classification."""
    if recipe.dataset not in SEGMENTATION:
        return Classification(recipe, device)
    from .segmentation import Segmentation  # with torchmetrics, which takes a second to import

    return Segmentation(recipe, device)
