"""Evaluation: of a network during training, and of saved, published or registered weights on a data set."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm.data
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from timm_deconv.errors import InputError
from timm_deconv.linalg import widest

from .recipe import Recipe, load_recipe
from .tasks import RecipeTask, Task

DRAWN = 100
"""Images that are drawn at most."""


def evaluate(task: Task, model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Return the task's figures over all images, each counted once whatever the number of processes, and `images`.

    Args:
        task: what to measure.
        model: not wrapped; put into evaluation.
        loader: prepared by the accelerator.
        accelerator: gathers from all processes.

    Returns:
        The named numbers of `Task.summarise`, and the number of images.
    """
    model.eval()
    total = torch.zeros(len(task.columns), device=accelerator.device, dtype=widest(accelerator.device))
    images = torch.zeros((), dtype=torch.long, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for batch in loader:
            figures = accelerator.gather_for_metrics(task.evaluate(model, batch))
            counted = ~(figures[:, 0] < 0)  # what is NaN counts
            total += torch.where(counted[:, None], figures, 0).sum(0)
            images += counted.sum()
    count = int(images)
    return {**task.summarise(total, count), "images": count}


def validate(
    model: nn.Module, task: RecipeTask, accelerator: Accelerator, drawings: str | Path | None = None
) -> dict[str, float]:
    """Evaluate a network on a task's images; return its figures and `images_per_second` (loading included).

    Args:
        model: any network.
        task: of the recipe whose images they are.
        accelerator: from `create_accelerator`.
        drawings: folder for pictures of what the network says of the first images; see `draw`.

    Raises:
        InputError: the data set cannot be found, or has other classes than the network.
    """
    loader = accelerator.prepare(task.evaluation_loader())
    model = model.to(accelerator.device, memory_format=torch.channels_last if task.recipe.channels_last else None)
    started = time.perf_counter()
    figures = evaluate(task, model, loader, accelerator)
    figures["images_per_second"] = figures["images"] / (time.perf_counter() - started)
    if drawings is not None and accelerator.is_main_process:
        draw(task, model, loader, Path(drawings))
    return figures


def draw(task: RecipeTask, model: nn.Module, loader: DataLoader, folder: Path) -> int:
    """Draw the first images of a loader, DRAWN at most, as 0000.png and so on; return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    count = 0
    with torch.no_grad():
        for batch in loader:
            for picture in task.drawn(model, batch):
                if count == DRAWN:
                    return count
                picture.save(folder / f"{count:04d}.png")
                count += 1
    return count


def evaluation_recipe(
    name: str, model: nn.Module, recipe: str | None, settings: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe to evaluate with: the data set of the run or a named recipe, the preprocessing of the weights.

    Args:
        name: what `models.loading.load_network` took; a folder's own recipe.yaml is used unless `recipe` is given.
        model: from `load_network`.
        recipe: a recipe's name or file.
        settings: replace the recipe's; where there is no recipe, `dataset` or `data_dir` (of folders or tars) says what
            to evaluate on.

    Raises:
        InputError: nothing says what to evaluate on.
    """
    own = Path(name) / "recipe.yaml"
    settings = dict(settings or {})
    if recipe is None and not own.exists():
        if not settings.keys() & {"dataset", "data_dir"}:
            raise InputError(f"nothing says which images {name} is for: give --recipe or --data-dir")
        settings = {"name": "custom", "dataset": "", **settings}
    base = load_recipe(recipe or (str(own) if own.exists() else "digits"))
    config = timm.data.resolve_data_config(model=model)
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
    return base.merged({key: config[key] for key in keys} | {"num_classes": model.num_classes} | settings)
