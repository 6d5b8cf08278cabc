"""Does a trained batch-norm network go on better as a deconvolution network? Both ways from the same weights.

OUT/batch_norm       the batch-norm network, trained
OUT/converted        its weights carried over and calibrated: the same function
OUT/twin, OUT/deconv trained on from there
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from timm_deconv.convert import calibrate
from timm_deconv.data.calibration import calibration_loader
from timm_deconv.errors import unknown_name
from timm_deconv.models.carry_over import carry_over

from .evaluation import load_network, validate
from .loop import create_accelerator, train
from .recipe import Recipe

__all__ = ["FORMS", "finetune"]

FORMS = ("twin", "deconv")

Row = dict[str, Any]


def finetune(pretraining: Recipe, further: Recipe, form: str, output_dir: Path, *, preset: str = "fast") -> list[Row]:
    """Train a batch-norm network, then go on with its weights; what is there of an earlier run is not done again.

    Args:
        pretraining: of a registered batch-norm network that has a `_deconv` form.
        further: settings of the training that follows, for both forms; the model is filled in.
        form: 'twin' goes on with batch norm, 'deconv' as a deconvolution network.
        output_dir: of all runs that are compared.
        preset: of the form 'deconv'.

    Returns:
        result rows with the accuracy after 0, 1, 2 ... further epochs, in float32 after 0.

    Raises:
        InputError: an unknown form, or see `train`.
    """
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    start = output_dir / "batch_norm"
    train(pretraining, start, resume=True)
    arguments: dict[str, Any] = {}
    if form == "deconv":
        start, arguments = _converted(start, output_dir / "converted", pretraining, preset), {"deconv": preset}
    model = pretraining.model if form == "twin" else f"{pretraining.model}_deconv"
    started_from = {**arguments, "checkpoint_path": str(start / "model.safetensors")}
    recipe = further.merged({"model": model, "model_kwargs": {**further.model_kwargs, **started_from}})
    before = _accuracy(load_network(str(start)), recipe)
    row = train(recipe, output_dir / form, resume=True)
    return list(_rows(row, arguments, before, output_dir / form / "curve.csv"))


def _converted(trained: Path, folder: Path, recipe: Recipe, preset: str) -> Path:
    """The trained network with its norms folded and its whiteners calibrated on training images, in a folder."""
    if not (folder / "model.safetensors").exists():
        model = carry_over(f"local-dir:{trained.resolve()}", policy=preset).eval()
        data = "digits" if recipe.dataset == "digits" else str(recipe.data_dir)
        calibrate(model, calibration_loader(model, data, images=2048, batch_size=recipe.batch_size))
        save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def _accuracy(model: nn.Module, recipe: Recipe) -> float:
    accelerator = create_accelerator(recipe.merged({"amp": False}), cpu=not torch.cuda.is_available())
    return validate(model, recipe, accelerator)["top1"]


def _rows(row: Row, arguments: dict[str, Any], before: float, curve: Path) -> Iterator[Row]:
    """The run's row for each further epoch; the checkpoint's place is left out."""
    common = row | {"model_kwargs": json.dumps(arguments, sort_keys=True) if arguments else ""}
    untrained = dict.fromkeys(("train_loss", "seconds", "images_per_second"), "")
    yield common | untrained | {"epochs": 0, "top1": round(before, 3), "best_top1": round(before, 3)}
    best = before
    for epoch in csv.DictReader(curve.read_text().splitlines()):
        best = max(best, float(epoch["top1"]))
        done = {"epochs": int(epoch["epoch"]), "seconds": epoch["seconds"], "train_loss": epoch["train_loss"]}
        yield common | done | {"top1": float(epoch["top1"]), "best_top1": round(best, 3)}
