"""Evaluation: of a network during training, and of saved, published or registered weights on a data set."""

import difflib
import json
import re
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.linalg import widest

from .drawing import draw
from .recipe import Recipe, load_recipe
from .tasks import RecipeTask, Task

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.@-]*")


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
        drawings: folder for pictures of what the network says of the first images; see `drawing.draw`.

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


def load_network(name: str) -> nn.Module:
    """Load a network with its weights, by the output folder of a run, a Hub id (`org/name`) or a name that timm knows.

    Raises:
        InputError: no such folder, name or repository (with the nearest names), or timm knows no weights for the name.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise InputError(f"{name} holds no config.json: no run of ours, or no epoch is finished yet")
        return _saved_network(Path(name))
    if ":" in name or "/" in name:
        return _load_from(name if ":" in name else f"hf-hub:{_hub_id(name)}")
    if not timm.is_model(name):
        raise unknown_name("model or folder", name, timm.list_models())
    if not timm.is_model_pretrained(name):
        raise InputError(f"{name} has no pretrained weights; give the output folder of a run")
    return timm.create_model(name, pretrained=True)


def _saved_network(folder: Path) -> nn.Module:
    try:
        return timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise InputError(
            f"{folder} is damaged ({type(error).__name__} {error}); resume the run, or take another of its folders"
        ) from error


def _hub_id(name: str) -> str:
    """Return the name if it can be no mistyped folder: it has two parts, the first of which is no folder here."""
    path = Path(name)
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return name
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    beside = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir())
    nearest = difflib.get_close_matches(missing.name, beside, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    raise InputError(f"no folder {name}{hint} (a repository of the Hub is named hf-hub:ORG/NAME)")


def _load_from(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, AssertionError) as error:  # which the errors of the Hub's client are too
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        raise InputError(
            f"{name} cannot be had ({reason}); is it the folder of a run, or ORG/NAME of the Hub?"
        ) from error


def evaluation_recipe(
    name: str, model: nn.Module, recipe: str | None, settings: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe to evaluate with: the data set of the run or a named recipe, the preprocessing of the weights.

    Args:
        name: what `load_network` took; a folder's own recipe.yaml is used unless `recipe` is given.
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
