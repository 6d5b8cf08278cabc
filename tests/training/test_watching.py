"""What a run tells: scalars for trackers, the health of its whitening, a profile, and where it ended."""

import sys
import types

import numpy as np
import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from timm_deconv import Deconv2d, DeconvLinear
from timm_deconv.errors import InputError
from timm_deconv.models.loading import load_network
from timm_deconv.training import loop
from timm_deconv.training.checkpoint import Progress, read_curve
from timm_deconv.training.evaluation import evaluation_recipe, validate
from timm_deconv.training.health import whitening_health
from timm_deconv.training.loop import create_accelerator, train
from timm_deconv.training.reporting import Reporter
from timm_deconv.training.tasks import create_task


@pytest.fixture
def whitened(short_recipe):
    return short_recipe.merged({"model": "resnet18_cifar_deconv", "model_kwargs": {"width": 0.125}})


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_loss_rate_accuracy_speed_and_health_by_default(whitened, tmp_path):
    train(whitened.merged({"log_interval": 2, "health_interval": 3}), tmp_path, cpu=True)
    found = scalars(tmp_path)
    assert all(list(found[tag]) == [2, 4] for tag in ("train/loss", "train/top1", "lr"))
    assert found["validation/top1"].keys() == found["train/images_per_second"].keys() == {4}
    health = {tag: values for tag, values in found.items() if tag.startswith("whitening/")}
    assert len(health) == 3 * 21 and all(list(values) == [3] for values in health.values())
    assert health["whitening/layer3.0.conv1/rows_to_features"][3] == 128 * 8 * 8 / 4 / 16  # one pixel in four


def test_a_layers_health_is_that_of_its_batch():
    torch.manual_seed(0)
    mixed = torch.randn(64, 4, 8, 8) @ torch.diag(torch.linspace(1, 2, 8))
    cfg = {"block": 4, "n_iter": 15, "eps": 1e-6, "sampling_stride": 1}
    net = nn.Sequential(Deconv2d(4, 3, 1, cfg=cfg), nn.Flatten(), DeconvLinear(192, 2, cfg={"block": 192, "n_iter": 5}))
    found = whitening_health(net, lambda: net(mixed))
    rows = mixed.permute(1, 0, 2, 3).flatten(1)
    assert found["0/residual"] < 1e-3 and found["0/rows_to_features"] == 64 * 64 / 4
    assert found["0/condition"] == pytest.approx(np.linalg.cond(np.cov(rows.numpy(), bias=True)), rel=1e-3)
    # 64 rows cannot fill 192 directions: two thirds stay without variance
    assert found["2/rows_to_features"] == pytest.approx(1 / 3) and found["2/residual"] > 0.8
    assert found["2/condition"] > 1e3


def test_padding_is_counted_as_the_whitener_counts_it():
    torch.manual_seed(0)
    layer = Deconv2d(4, 3, 3, padding=1, cfg={"layout": "channels", "block": 4, "n_iter": 15, "eps": 1e-6})
    net = nn.Sequential(layer)
    assert whitening_health(net, lambda: net(torch.randn(64, 4, 4, 4) + 3))["0/residual"] < 0.05


def test_a_batch_that_is_not_finite_has_no_health_and_stops_nothing():
    net = nn.Sequential(Deconv2d(4, 3, 1))
    found = whitening_health(net, lambda: net(torch.full((8, 4, 4, 4), torch.inf)))
    assert np.isnan(found["0/residual"]) and np.isnan(found["0/condition"])


def test_looking_at_health_changes_nothing(whitened, tmp_path):
    recipe = whitened.merged({"mixup": 0.2, "model_kwargs": {"width": 0.125, "drop_rate": 0.2}})
    rows = [train(recipe.merged({"health_interval": n}), tmp_path / str(n), cpu=True) for n in (0, 1)]
    assert rows[0]["train_loss"] == rows[1]["train_loss"]
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()
    assert not [tag for tag in scalars(tmp_path / "0") if tag.startswith("whitening")]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_accelerates_where_they_are_installed(short_recipe, tmp_path, monkeypatch, name):
    both = short_recipe.merged({"log_with": ["tensorboard", name], "log_interval": 2})
    if name not in sys.modules:
        with pytest.raises(InputError, match=f"log_with: {name} is not installed; pip install {name}"):
            train(both, tmp_path / "missing", cpu=True)
        assert not (tmp_path / "missing").exists()
    told = []
    run = types.SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end"))
    stand_in = types.ModuleType(name)
    stand_in.init = lambda **settings: told.append(settings) or run
    monkeypatch.setitem(sys.modules, name, stand_in)
    stand_in.__spec__ = types.SimpleNamespace()
    train(both, tmp_path / "run", cpu=True)
    assert told[0] == {"project": "timm_deconv", "name": str(tmp_path / "run")} and told[-1] == "end"
    steps = {step: set(values) for step, values in told[1:-1] if "train/loss" in values}
    assert steps == {step: {"train/loss", "train/top1", "lr"} for step in (2, 4)}
    assert scalars(tmp_path / "run")["train/loss"].keys() == {2, 4}


def test_a_tracker_that_does_not_start_is_named_in_one_line(short_recipe, tmp_path, monkeypatch):
    def init(**settings):
        raise RuntimeError("no API key configured\nuse wandb login")

    stand_in = types.ModuleType("wandb")
    stand_in.init, stand_in.__spec__ = init, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(InputError, match=r"one of wandb does not start \(no API key configured use wandb login\)"):
        train(short_recipe.merged({"log_with": "wandb"}), tmp_path, cpu=True)


def test_a_run_may_have_no_tracker(short_recipe, tmp_path):
    train(short_recipe.merged({"log_with": []}), tmp_path, cpu=True)
    assert not (tmp_path / "tensorboard").exists()


def test_a_profile_names_the_operations_of_a_few_updates(whitened, tmp_path, capsys):
    train(whitened.merged({"batch_size": 32, "health_interval": 0}), tmp_path, cpu=True, profile=True)
    assert "profile of 4 updates" in capsys.readouterr().err
    told = (tmp_path / "profile" / "operations.txt").read_text()
    calls = next(line.split()[-1] for line in told.splitlines() if "_WhitenedConvBackward" in line)
    assert calls == str(4 * 21)  # of 20 convolutions and the classifier
    assert (tmp_path / "profile" / "trace.json").stat().st_size > 10_000
    train(whitened, tmp_path / "short", cpu=True, profile=True)
    assert "no profile: the run had fewer than 7 updates" in capsys.readouterr().err


def test_the_best_epoch_is_kept_and_said_with_what_comes_next(short_recipe, tmp_path, monkeypatch, capsys):
    accuracies, evaluate = iter([50.0, 70.0, 60.0]), loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *args: {**evaluate(*args), "top1": next(accuracies)})
    train(short_recipe.merged({"epochs": 3}), tmp_path / "run", cpu=True)
    said = capsys.readouterr().err.splitlines()
    best = tmp_path / "run" / "best"
    assert said[-2] == f"best of 3 epochs: 2, top1 70.00 %, in {best}; the last one is in {tmp_path / 'run'}"
    assert said[-1] == f"go on: timm-deconv validate {best}"
    monkeypatch.undo()
    model = load_network(str(best))
    accelerator = create_accelerator(short_recipe, cpu=True)
    task = create_task(evaluation_recipe(str(best), model, None), accelerator.device)
    assert validate(model, task, accelerator)["images"] == 128
    states = [timm.create_model(f"local-dir:{path}", pretrained=True).state_dict() for path in (best, best.parent)]
    assert not torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])
    train(short_recipe.merged({"epochs": 2}), tmp_path / "two", cpu=True)
    assert len(read_curve(tmp_path / "two")) == 2


def test_time_left_is_that_of_the_epochs_to_come(short_recipe, capsys):
    report = Reporter(short_recipe.merged({"epochs": 10}), create_accelerator(short_recipe, cpu=True), "top1", 512)
    progress = Progress(epoch=4, seconds=1000.0, training_seconds=800.0)
    report.epoch(progress, {"loss": 1.0, "top1": 10.0}, {"loss": 1.0, "top1": 20.0})
    assert "3 images/s, 1000 s, 0:25:00 left" in capsys.readouterr().err


def test_the_bar_counts_images_and_names_the_epoch(short_recipe, monkeypatch):
    report = Reporter(short_recipe.merged({"epochs": 3}), create_accelerator(short_recipe, cpu=True), "top1", 512)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = report.bar(["batch"] * 4, Progress(epoch=1, consumed=256))
    shown = str(bar)
    bar.close()
    assert shown.startswith("epoch 2/3:  50%") and "256/512" in shown and "img/s" in shown
