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


@pytest.fixture
def report(tmp_path):
    """What two processes did: one run with batch norm, one without statistics of a batch."""
    normed = load_recipe("digits", ["model=test_resnet", "model_kwargs={}", "epochs=1", "batch_size=128"])
    plain = normed.merged({"model": "test_convnext", "augmentation": "none"})
    (tmp_path / "normed.yaml").write_text(normed.yaml())
    (tmp_path / "plain.yaml").write_text(plain.yaml())
    command = [sys.executable, str(SCRIPT), *(str(tmp_path / name) for name in ("", "normed.yaml", "plain.yaml"))]
    processes = start(command, 2)
    (said, errors), (_, errors_of_second) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], (errors + errors_of_second)[-3000:]
    return {"plain": plain, "stderr": errors + errors_of_second, **json.loads(said.splitlines()[-1])}


def test_two_processes_learn_what_one_learns_hold_the_same_and_count_and_write_it_once(report, tmp_path):
    """One test, as two would start the processes twice where tests run side by side."""
    train(report["plain"], tmp_path / "alone")
    one, two = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("alone", "plain"))
    apart = sum(((one[name] - two[name]) ** 2).sum() for name in one)
    assert (apart / sum((value**2).sum() for value in one.values())).sqrt() < 1e-4
    assert report["processes"] == 2 and report["differences"] == [0.0, 0.0], "after an epoch"
    assert report["images"] == 364, "every evaluation image is counted once"
    for name in ("normed", "plain"):
        assert len((tmp_path / name / "results.csv").read_text().splitlines()) == 2, "the main process alone writes"
        timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
    assert report["stderr"].count("epoch 1/1") == 2
