"""One CSV row a finished run: what, with which settings, on what, how good, how fast."""

import csv
import datetime
import fcntl
import io
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch

from timm_deconv.errors import InputError
from timm_deconv.resources import checkout_configs

from .recipe import Recipe

COLUMNS = (
    "model model_kwargs recipe recipe_hash seed dataset data epochs batch_size lr weight_decay top1 best_top1 "
    "train_loss seconds images_per_second parameters hardware processes torch timm timm_deconv date"
).split()


def record_path(recipe: Recipe) -> Path:
    """hub_configs/results/DATASET.csv of the checkout.

    Raises:
        InputError: the package is installed, not a checkout.
    """
    configs = checkout_configs()
    if configs is None:
        raise InputError("--record needs a checkout of the project: an installed package has no results to add to")
    return configs / "results" / f"{dataset_name(recipe)}.csv"


def dataset_name(recipe: Recipe) -> str:
    """The data set in one word: cifar10 for torch/cifar10; the data folder's name where the recipe says '' only."""
    return recipe.dataset.split("/")[-1] or Path(recipe.data_dir or "folder").resolve().name


def describe_run(recipe: Recipe) -> dict[str, object]:
    """The columns that are known before the run."""
    return {
        "model": recipe.model,
        "model_kwargs": json.dumps(recipe.model_kwargs, sort_keys=True) if recipe.model_kwargs else "",
        "recipe": recipe.name,
        "recipe_hash": recipe.hash(),
        "seed": recipe.seed,
        "dataset": dataset_name(recipe),
        "data": Path(recipe.data_dir).resolve().name if recipe.data_dir else "",
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size * recipe.grad_accum_steps,
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
    }


def describe_machine(device: torch.device) -> dict[str, object]:
    """Hardware, versions and the date."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "timm_deconv": _own_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def append_row(path: Path, row: dict[str, object]) -> None:
    """Adds a row to a CSV of COLUMNS, which is created with its header where it is missing; safe beside other runs.

    Raises:
        InputError: the file has other columns.
        OSError: the row could not be written; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        text = _line(COLUMNS) if size == 0 else _check_header(file, path)
        text += _line([row[column] for column in COLUMNS])
        try:
            written = file.write(text.encode())
        except OSError:
            file.truncate(size)
            raise
        if written != len(text.encode()):
            file.truncate(size)
            raise OSError(f"the result row did not fit into {path}; make room and add --resume")


def _check_header(file: io.FileIO, path: Path) -> str:
    file.seek(0)
    text = file.read().decode()
    header = next(csv.reader(io.StringIO(text)))
    if header != COLUMNS:
        differing = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
        raise InputError(f"{path} has other columns ({', '.join(differing)}); move it away")
    return "" if text.endswith("\n") else "\n"


def _line(values: list[object] | list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _own_version() -> str:
    try:
        return version("timm_deconv")
    except PackageNotFoundError:
        return "source"
