"""Evaluation: of a network during training, and of saved, published or registered weights on a data set."""

import time
from pathlib import Path

import timm
import timm.data
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from timm_deconv.errors import InputError, unknown_name

from .recipe import Recipe, load_recipe
from .tasks import Classification, Task


def evaluate(task: Task, model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """The task's figures over all images, each counted once whatever the number of processes; `images` is their number.

    Args:
        task: what to measure.
        model: not wrapped; put into evaluation.
        loader: prepared by the accelerator.
        accelerator: gathers from all processes.
    """
    model.eval()
    total = torch.zeros(len(task.columns), device=accelerator.device, dtype=torch.float64)
    images = 0
    with torch.no_grad(), accelerator.autocast():
        for batch in loader:
            figures = accelerator.gather_for_metrics(task.evaluate(model, batch))
            total += figures.sum(0)
            images += len(figures)
    return {**task.summarise(total, images), "images": images}


def validate(model: nn.Module, recipe: Recipe, accelerator: Accelerator) -> dict[str, float]:
    """`evaluate` on the recipe's evaluation images, with `images_per_second` (loading included).

    Raises:
        InputError: the data set cannot be found, or has other classes than the network.
    """
    task = Classification(recipe, accelerator.device)
    loader = accelerator.prepare(task.evaluation_loader())
    model = model.to(accelerator.device, memory_format=torch.channels_last if recipe.channels_last else None)
    started = time.perf_counter()
    figures = evaluate(task, model, loader, accelerator)
    return {**figures, "images_per_second": figures["images"] / (time.perf_counter() - started)}


def load_network(name: str) -> nn.Module:
    """A network with its weights: the output folder of a run, a Hub id (`org/name`), or a name of `timm.list_models()`.

    Raises:
        InputError: no such folder or name (with the nearest), or timm knows no weights for the name.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise InputError(f"{name} holds no config.json: no run of ours, or no epoch is finished yet")
        return timm.create_model(f"local-dir:{Path(name).resolve()}", pretrained=True)
    if ":" in name or "/" in name:
        return timm.create_model(name if ":" in name else f"hf-hub:{name}", pretrained=True)
    if not timm.is_model(name):
        raise unknown_name("model or folder", name, timm.list_models())
    if not timm.is_model_pretrained(name):
        raise InputError(f"{name} has no pretrained weights; give the output folder of a run")
    return timm.create_model(name, pretrained=True)


def evaluation_recipe(name: str, model: nn.Module, recipe: str | None) -> Recipe:
    """The recipe to evaluate with: the data set of the run or of the named recipe, the preprocessing of the weights.

    Args:
        name: what `load_network` took; a folder's own recipe.yaml is used unless `recipe` is given.
        model: from `load_network`.
        recipe: a recipe's name or file.
    """
    own = Path(name) / "recipe.yaml"
    base = load_recipe(recipe or (str(own) if own.exists() else "digits"))
    config = timm.data.resolve_data_config(model=model)
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
    return base.merged({key: config[key] for key in keys} | {"num_classes": model.num_classes})
