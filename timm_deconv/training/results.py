"""One CSV row a finished run: what, with which settings, on what, how good, how fast."""

import csv
import datetime
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import timm_deconv
from timm_deconv.atomic_io import lock
from timm_deconv.convert import resolve_policy
from timm_deconv.errors import InputError
from timm_deconv.models import list_models
from timm_deconv.resources import checkout_configs

from .recipe import Recipe

COLUMNS = (
    "model model_kwargs recipe recipe_hash seed dataset data epochs batch_size lr weight_decay top1 best_top1 "
    "train_loss seconds images_per_second parameters hardware processes torch timm timm_deconv date"
).split()


def record_path(recipe: Recipe) -> Path:
    """Return hub_configs/results/DATASET.csv of the checkout.

    Raises:
        InputError: the package is installed, not a checkout.
    """
    configs = checkout_configs()
    if configs is None:
        raise InputError("--record needs a checkout of the project: an installed package has no results to add to")
    return configs / "results" / f"{dataset_name(recipe)}.csv"


def dataset_name(recipe: Recipe) -> str:
    """Name the data set in one word: cifar10 for torch/cifar10, the data folder's name where the recipe has no name."""
    return recipe.dataset.split("/")[-1] or Path(recipe.data_dir or "folder").resolve().name


def describe_run(recipe: Recipe) -> dict[str, object]:
    """Return the columns that are known before the run."""
    return {
        "model": recipe.model,
        "model_kwargs": json.dumps(kwargs, sort_keys=True) if (kwargs := _model_kwargs(recipe)) else "",
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


def _model_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's, in a network of this package with the preset by name: a later default changes no old row."""
    if recipe.model.split(".")[0] not in list_models():
        return recipe.model_kwargs
    return recipe.model_kwargs | {"deconv": resolve_policy(recipe.model_kwargs.get("deconv")).to_dict()}


def describe_machine(device: torch.device) -> dict[str, object]:
    """Return the columns of hardware, versions and date."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "timm_deconv": timm_deconv.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def append_row(path: Path, row: Mapping[str, object], headline: str = "top1") -> None:
    """Add the row of a run to a CSV of COLUMNS, `headline` in place of top1; see `append_rows`."""
    append_rows(path, [column.replace("top1", headline) for column in COLUMNS], [row])


def append_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to a CSV file, all of them or none, in one write; create it with its header where it is missing.

    Safe beside other processes that add rows to the same file.

    Args:
        path: the file; its folder is made.
        columns: the file's header.
        rows: a value for every column; others are left out.

    Raises:
        InputError: the file has other columns.
        OSError: the rows could not be written; the file is as it was.
    """
    lines = "".join(_line([row[column] for column in columns]) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        lock(file)
        size = file.seek(0, os.SEEK_END)
        start = _line(columns) if size == 0 else _check_header(file, path, list(columns))
        _write(file, path, (start + lines).encode())


def _write(file: io.FileIO, path: Path, text: bytes) -> None:
    """Add all of the text at the end, or nothing."""
    size = file.seek(0, os.SEEK_END)
    written = 0
    try:
        written = file.write(text)
    finally:
        if written != len(text):
            file.truncate(size)
    if written != len(text):
        raise OSError(f"the results did not fit into {path}; make room and run it again, a training with --resume")


def _check_header(file: io.FileIO, path: Path, columns: list[str]) -> str:
    """Check the file's columns; return what stands between its last row and a new one: nothing or a missing line break.

    Raises:
        InputError: it has other columns.
    """
    file.seek(0)
    text = file.read().decode()
    header = next(csv.reader(io.StringIO(text)))
    if header != columns:
        differing = sorted(set(header) ^ set(columns)) or ["their order"]
        raise InputError(f"{path} has other columns ({', '.join(differing)}); move it away")
    return "" if text.endswith("\n") else "\n"


def _line(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
