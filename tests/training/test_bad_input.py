"""Whatever cannot be used ends train.py with one line and exit code 1, before a batch is trained on.

What needs several processes (a port in use, one that never joins) is in `test_faults`, full disks and folders that
cannot be written in `test_checkpoint` and `test_resuming`, labels of the Hub's data sets in `tests/data`.
"""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_deconv.training.loop import Trainer

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = "--cpu model=test_resnet model_kwargs={} epochs=1 batch_size=4 workers=0 num_classes=2".split()
CLASSES = ["digits", "dataset=", *SMALL]
MASKS = ["camvid", "dataset=masks", "input_size=[3,32,32]", *SMALL]


def write_classes(root, train=("a", "b"), val=("a", "b")):
    for part, names in (("train", train), ("val", val)):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (32, 32), (60 * index, 0, 0)).save(root / part / name / f"{index}.png")
    return root


def write_masks(root, number=1, size=(32, 32)):
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (32, 32)).save(root / part / "images" / f"{index}.png")
            mask = np.full(size, number if index == 3 else 0, np.uint8)
            Image.fromarray(mask).save(root / part / "masks" / f"{index}.png")
    return root


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def refused(monkeypatch, message, *arguments, name="train.py"):
    """Check that a script ends in one line, and without training."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message) as ended:
        patch.setattr(Trainer, "train_epoch", lambda self: pytest.fail("an epoch has begun"))
        run(patch, name, *arguments)
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code  # Python says it and exits with 1


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (["a"], ["a"], "num_classes=2, but the training images have 1 classes"),
        (["a", "b", "c"], ["a", "b"], "num_classes=2, but the training images have 3 classes"),
        (["a", "b"], ["a"], "training and evaluation images differ in their classes: b"),
        (["a", "b"], ["b", "c"], "training and evaluation images differ in their classes: a, c"),
    ],
)
def test_folders_of_other_classes(monkeypatch, tmp_path, train, val, message):
    data = write_classes(tmp_path / "data", train, val)
    refused(monkeypatch, message, *CLASSES, "--data-dir", data, "--output-dir", tmp_path / "run")
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


def test_folders_without_classes_or_images(monkeypatch, tmp_path):
    data = write_classes(tmp_path / "data")
    where = ["--data-dir", data, "--output-dir", tmp_path / "run"]
    for file in (data / "train" / "b").iterdir():
        file.unlink()
    refused(monkeypatch, "num_classes=2, but the training images have 1 classes", *CLASSES, *where)
    for file in (data / "train" / "a").iterdir():
        file.rename(data / "train" / file.name)
    refused(monkeypatch, "num_classes=2, but the training images have 1 classes", *CLASSES, *where)
    for file in (data / "train").glob("*.png"):
        file.unlink()
    refused(monkeypatch, "no images in .*/train", *CLASSES, *where)
    where[1] = tmp_path / "dta"
    refused(monkeypatch, "no data folder .*/dta; check --data-dir", *CLASSES, *where)


def test_masks_that_do_not_fit(monkeypatch, tmp_path):
    cases = {
        "sizes": ({"size": (16, 32)}, r"mask .*/train/masks/0.png is 32x16 and its image 32x32; both need one size"),
        "numbers": ({"number": 7}, r"mask .*/train/masks/3.png has pixels of 7, which is no class"),
        "missing": ({}, r"1 of 4 images in .*/val have no mask, images/2.png among them; add masks/2.png"),
        "empty": ({}, r"unreadable image .*/val/images/2.png with mask masks/2.png \(index 2\)"),
    }
    for name, (settings, message) in cases.items():
        data = write_masks(tmp_path / name, **settings)
        if name == "missing":
            (data / "val" / "masks" / "2.png").unlink()
        if name == "empty":
            (data / "val" / "masks" / "2.png").write_bytes(b"")
        refused(monkeypatch, message, *MASKS, "--data-dir", data, "--output-dir", tmp_path / "run")


def test_runs_of_other_settings_and_folders_that_are_none(monkeypatch, tmp_path):
    data, folder = write_classes(tmp_path / "data"), tmp_path / "run"
    where = ["--data-dir", data, "--output-dir", folder]
    run(monkeypatch, "train.py", *CLASSES, *where)
    saved = (folder / "model.safetensors").read_bytes()
    refused(monkeypatch, "holds this run already; add --resume", *CLASSES, *where)
    refused(monkeypatch, r"other settings \(lr: 0.1 there, 0.5 here\)", *CLASSES, "lr=0.5", "--resume", *where)
    other = r"other settings \(model: test_resnet there, test_vit here"
    refused(monkeypatch, other, *CLASSES, "model=test_vit", "--resume", *where)
    assert (folder / "model.safetensors").read_bytes() == saved
    (folder / "recipe.yaml").write_text("a: [")
    refused(monkeypatch, r"recipe.yaml: not YAML", *CLASSES, "--resume", *where)
    (tmp_path / "file").write_text("mine")
    where[-1] = tmp_path / "file"
    refused(monkeypatch, "file is a file; choose another --output-dir", *CLASSES, *where)
    assert (tmp_path / "file").read_text() == "mine"


def test_weights_that_are_missing_or_damaged(monkeypatch, tmp_path):
    data, folder = write_classes(tmp_path / "data"), tmp_path / "run"
    where = ["--data-dir", data, "--output-dir", folder]
    refused(monkeypatch, "no checkpoint runs/nowhere", *CLASSES, "pretrained_path=runs/nowhere", *where)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    refused(monkeypatch, "cannot be read as weights", *CLASSES, f"pretrained_path={tmp_path}/junk.safetensors", *where)
    run(monkeypatch, "train.py", *CLASSES, *where)
    (folder / "model.safetensors").write_bytes(b"junk")
    refused(monkeypatch, "run is damaged .SafetensorError", folder, "--cpu", name="validate.py")
    (folder / "config.json").write_text("{")
    refused(monkeypatch, "run is damaged .JSONDecodeError", folder, "--cpu", name="validate.py")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch_size=100", "batch_size=100: there are only 8 training images; lower it"),
        ("val_images=100", "100 images asked for, but there are only 8"),
        ("input_size=[1,32,32]", "mean and std need 1 values"),
        ("log_with=wandb", "log_with: wandb is not installed; pip install wandb"),
        ("opt=fusedadam", "opt='fusedadam' cannot be made"),
        ("sched_kwargs.decay=3", r"no argument \(sched_kwargs\) of timm's schedules 'decay'"),
        ("pretrained=true", "weights of test_resnet cannot be had .*; give pretrained_path"),
    ],
)
def test_settings_that_fit_neither_images_nor_machine(monkeypatch, tmp_path, setting, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = write_classes(tmp_path / "data")
    refused(monkeypatch, message, *CLASSES, setting, "--data-dir", data, "--output-dir", tmp_path / "run")
