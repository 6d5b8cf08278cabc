"""Going on from trained batch-norm weights: the same function at the start, then rows of both ways."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

from timm_deconv.errors import InputError
from timm_deconv.training import load_recipe
from timm_deconv.training.finetune import finetune

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"


def test_both_ways_start_from_the_same_accuracy_and_are_recorded(monkeypatch, tmp_path: Path) -> None:
    settings = ["epochs=2", "batch_size=128", "model_kwargs.width=0.25"]
    arguments = ["digits", *settings, "--model", "resnet18_cifar", "--further", "epochs=1", "lr=0.02"]
    arguments += ["--output-dir", tmp_path / "runs"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = list(csv.DictReader((tmp_path / "runs" / "results.csv").read_text().splitlines()))
    assert [(row["model"], row["epochs"]) for row in rows] == [
        ("resnet18_cifar", "0"),
        ("resnet18_cifar", "1"),
        ("resnet18_cifar_deconv", "0"),
        ("resnet18_cifar_deconv", "1"),
    ]
    before, _, carried_over, after = (float(row["top1"]) for row in rows)
    assert carried_over == before
    assert after > before
    assert not any("safetensors" in value for row in rows for value in row.values())


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("digits")
    with pytest.raises(InputError, match="no form 'norm'"):
        finetune(recipe, recipe, "norm", tmp_path)
