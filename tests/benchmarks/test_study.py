"""Studies: variants are what their texts say, runs are recorded once, and the picture's rows are theirs."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.baselines import IterativeNorm2d
from benchmarks.plots import unbeaten
from benchmarks.step import StepSettings
from benchmarks.study import (
    COLUMNS,
    PARETO_COLUMNS,
    final_accuracies,
    pareto_rows,
    rate_rows,
    train_variants,
    variant,
)
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d
from timm_deconv.training import Recipe, load_recipe

SCRIPT = Path(__file__).parents[2] / "scripts" / "study.py"
SETTINGS = ["epochs=1", "batch_size=128", "train_images=256", "val_images=128"]


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("digits", SETTINGS).merged({"model_kwargs": {"width": 0.125}})


def test_a_variant_is_a_form_and_its_settings(recipe: Recipe) -> None:
    fast = variant("fast deconv.block=16 deconv.roles.classifier.block=8 lr=0.05", "vgg11_cifar", recipe)
    assert fast.recipe.lr == 0.05 and fast.recipe.model == "vgg11_cifar_deconv"
    layers = [module for module in fast.create_model().modules() if isinstance(module, Deconv2d)]
    assert {layer.cfg.block for layer in layers} == {16}
    assert fast.create_model().get_classifier().cfg.block == 8
    norms = [type(module) for module in variant("iterative", "vgg11_cifar", recipe).create_model().modules()]
    assert norms.count(IterativeNorm2d) == 8 and nn.BatchNorm2d not in norms
    twin = variant("twin opt=muon", "vgg11_cifar", recipe)
    assert (twin.recipe.model, twin.recipe.opt) == ("vgg11_cifar", "muon")


@pytest.mark.parametrize(
    ("text", "network", "message"),
    [
        ("fasst", "vgg11_cifar", "no variant 'fasst'; nearest: fast"),
        ("fast", "vgg12_cifar", "no pair of networks 'vgg12_cifar'"),
        ("fast learning=1", "vgg11_cifar", "no recipe key 'learning'"),
        ("fast live_every=0", "vgg11_cifar", "live_every=0 must be a whole number of steps, 1 or more"),
        ("fast live_every=2 between=first", "vgg11_cifar", "no kind of statistics 'first'"),
        ("twin live_every=2", "vgg11_cifar", "live_every= is for whitened networks"),
    ],
)
def test_what_is_not_known_is_refused(recipe: Recipe, text: str, network: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        variant(text, network, recipe)


@pytest.mark.parametrize("between", ["average", "last"])
def test_statistics_live_in_some_steps_alone(recipe: Recipe, between: str) -> None:
    sparse = variant(f"fast live_every=2 between={between} lr=0.05", "vgg11_cifar", recipe)
    task = sparse.task(sparse.recipe, torch.device("cpu"))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    model, batch = task.create_model().train(), (images, torch.arange(4))
    layers = [module for module in model.modules() if isinstance(module, Deconv2d)]
    counts, losses = [], []
    for _ in range(5):
        before = [layer.running_deconv.clone() for layer in layers]
        losses.append(float(task.loss(model, batch)[0].detach()))
        counts.append({int(layer.num_batches_tracked) for layer in layers})
        if counts[-1] == counts[:-1][-1:]:
            assert all(torch.equal(layer.running_deconv, value) for layer, value in zip(layers, before, strict=True))
    assert counts == [{1}, {1}, {2}, {2}, {3}] and sparse.recipe.lr == 0.05
    same = [abs(live - kept) < 1e-4 * live for live, kept in ((losses[0], losses[1]), (losses[2], losses[3]))]
    assert same == [between == "last"] * 2


def test_runs_are_recorded_once_and_compared_with_their_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Recipe
) -> None:
    output, names = tmp_path / "study.csv", ["twin", "iterative", "fast deconv.block=16"]
    arguments = ["digits", "vgg11_cifar", *SETTINGS, "--width", 0.125, "--output", output, "--variants", *names]
    _run(monkeypatch, *arguments, "--seeds", 0, 1)
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert list(rows[0]) == COLUMNS
    assert sorted((row["variant"], row["seed"]) for row in rows) == [(n, s) for n in sorted(names) for s in "01"]
    variants = [variant(name, "vgg11_cifar", recipe) for name in names]
    said: list[str] = []
    train_variants(variants, [0, 1], tmp_path / "runs", [output], said.append)
    assert not said and len(output.read_text().splitlines()) == 1 + len(rows)
    twins = [float(row["top1"]) for row in rows if row["variant"] == "twin"]
    assert final_accuracies(output, variants)["twin"] == twins
    _run(monkeypatch, *arguments, "--picture", tmp_path / "pareto.png", "--rounds", 2)
    measured = list(csv.DictReader((tmp_path / "study_pareto.csv").read_text().splitlines()))
    assert list(measured[0]) == PARETO_COLUMNS and (tmp_path / "pareto.png").exists()
    assert [row["variant"] for row in measured] == names
    assert float(measured[0]["top1"]) == pytest.approx(sum(twins) / 2, abs=0.01)
    assert all(float(row["seconds"]) > 0 and row["seeds"] == "2" for row in measured)


def test_a_picture_of_nothing_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(InputError, match="has no rows of these variants; train them first"):
        pareto_rows(tmp_path / "study.csv", [variant("twin", "vgg11_cifar", recipe)], StepSettings())


def test_the_front_is_what_nothing_beats_in_both() -> None:
    rows = [{"seconds": s, "top1": a} for s, a in ((3, 70), (1, 60), (2, 55), (4, 69), (1, 50))]
    assert [(row["seconds"], row["top1"]) for row in unbeaten(rows)] == [(1, 60), (3, 70)]


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_rates_are_read_from_the_rows_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.csv"
    common = dict.fromkeys(COLUMNS, "") | {"network": "net", "data": "set", "recipe": "finetune", "epochs": 2}
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        for name, lr, seed, top1 in (
            ("twin", 0.1, 0, 40),
            ("twin", 0.1, 1, 50),
            ("fast", 0.1, 0, 60),
            ("fast", 1, 0, 9),
        ):
            for epoch in (1, 2):
                text = f"{name} lr={lr}"
                row = {"variant": text, "lr": lr, "seed": seed, "epoch": epoch, "top1": top1 * epoch / 2}
                writer.writerow(common | row)
    rows = {(row["variant"], row["lr"]): row for row in rate_rows(file)}
    assert rows["twin", 0.1] | {"value": 45.0, "seeds": 2, "deviation": 7.071, "figure": "top1"} == rows["twin", 0.1]
    assert rows["fast", 0.1]["value"] == 60 and rows["fast", 1.0]["value"] == 9
    arguments = ["finetune", "mobilenetv2_100", "--rates", tmp_path / "rates.png", "--output", file]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (tmp_path / "rates.png").stat().st_size > 5000


def test_comparisons_that_would_not_be_what_their_row_says_are_refused(recipe: Recipe) -> None:
    for text in ("iterative dataset=camvid", "iterative freeze_bn=true"):
        with pytest.raises(InputError, match="iterative normalisation is compared in classification"):
            variant(text, "vgg11_cifar", recipe)
    twin = variant("twin", "vgg11_cifar", recipe.merged({"model_kwargs": {"deconv": "fast", "width": 0.5}}))
    assert twin.recipe.model_kwargs == {"width": 0.5}
