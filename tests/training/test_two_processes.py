"""Two processes (gloo) train as one."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm

from benchmarks.killing import start
from timm_deconv.training import load_recipe
from timm_deconv.training.loop import train

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What two processes did: one run with batch norm, one without statistics of a batch."""
    folder = tmp_path_factory.mktemp("two")
    normed = load_recipe("digits", ["model=test_resnet", "model_kwargs={}", "epochs=1", "batch_size=128"])
    plain = normed.merged({"model": "test_convnext", "augmentation": "none"})
    (folder / "normed.yaml").write_text(normed.yaml())
    (folder / "plain.yaml").write_text(plain.yaml())
    command = [sys.executable, str(SCRIPT), str(folder), str(folder / "normed.yaml"), str(folder / "plain.yaml")]
    processes = start(command, 2)
    (said, errors), (_, errors_of_second) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], (errors + errors_of_second)[-3000:]
    return {"folder": folder, "plain": plain, "stderr": errors + errors_of_second, **json.loads(said.splitlines()[-1])}


def test_two_processes_learn_what_one_learns(report, tmp_path):
    train(report["plain"], tmp_path)
    one, two = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (tmp_path, report["folder"] / "plain")
    )
    apart = sum(((one[name] - two[name]) ** 2).sum() for name in one)
    assert (apart / sum((value**2).sum() for value in one.values())).sqrt() < 1e-4


def test_after_an_epoch_all_processes_hold_the_same_weights_and_statistics(report):
    assert report["processes"] == 2 and report["differences"] == [0.0, 0.0]


def test_every_evaluation_image_is_counted_once(report):
    assert report["images"] == 364


def test_only_the_main_process_writes(report):
    for name in ("normed", "plain"):
        folder = report["folder"] / name
        assert len((folder / "results.csv").read_text().splitlines()) == 2
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert report["stderr"].count("epoch 1/1") == 2
