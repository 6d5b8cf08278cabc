"""The same photographs train from folders, tars, shards and data sets of the Hub; streams go on in mid-epoch."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import read_photographs, write_folders, write_parquet, write_shards
from timm_deconv.errors import InputError
from timm_deconv.training import load_recipe
from timm_deconv.training.loop import create_accelerator, train
from timm_deconv.training.tasks import Classification, create_task

COUNT = 16
NETWORK = {"model": "test_resnet", "model_kwargs": {}, "num_classes": COUNT}
SETTINGS = NETWORK | {"epochs": 1, "batch_size": 4, "workers": 0}


@pytest.fixture(scope="module")
def forms(data_dir, tmp_path_factory):
    """Settings of each form, by name; training and evaluation images are the same."""
    root = tmp_path_factory.mktemp("forms")
    photographs = read_photographs(data_dir, COUNT)
    for part in ("train", "validation"):
        write_folders(photographs, root / "folders" / part)
        (root / "tars").mkdir(exist_ok=True)
        with tarfile.open(root / "tars" / f"{part}.tar", "w") as tar:
            tar.add(root / "folders" / part, "")
        write_shards(photographs, root / "shards", part, shards=4)
        write_parquet(photographs, root / "hub", part)
    return {
        "folders": {"dataset": "", "data_dir": str(root / "folders")},
        "tars": {"dataset": "", "data_dir": str(root / "tars")},
        "shards": {"dataset": "wds/", "data_dir": str(root / "shards")},
        "hfds": {"dataset": f"hfds/{root / 'hub'}", "data_dir": str(root / "cache")},
        "hfids": {
            "dataset": f"hfids/{root / 'hub'}",
            "data_dir": str(root / "cache"),
            "train_split": f"train|{COUNT}",
            "val_split": f"validation|{COUNT}",
        },
    }


@pytest.fixture
def recipe():
    return load_recipe("digits", ["augmentation=rrc", "input_size=[3,32,32]"]).merged(SETTINGS)


@pytest.mark.parametrize("form", ["folders", "tars", "shards", "hfds", "hfids"])
def test_every_form_trains_and_is_evaluated_on_each_image_once(forms, recipe, tmp_path, form):
    recipe = recipe.merged(forms[form])
    row = train(recipe, tmp_path, cpu=True)
    assert row["train_loss"] > 0
    task, accelerator = create_task(recipe, torch.device("cpu")), create_accelerator(recipe, cpu=True)
    labels = torch.cat([labels for _, labels in accelerator.prepare(task.evaluation_loader())])
    assert sorted(labels.tolist()) == list(range(COUNT))
    few = create_task(recipe.merged({"val_images": 5}), torch.device("cpu")).evaluation_loader()
    assert sum(len(labels) for _, labels in few) == 5


@pytest.mark.parametrize("form", ["shards", "hfids"])
def test_a_run_on_a_stream_goes_on_in_the_middle_of_an_epoch(forms, recipe, tmp_path, monkeypatch, form):
    recipe = recipe.merged({**forms[form], "epochs": 2, "checkpoint_every": "1"})
    steps, loss = [], Classification.loss

    def counted(self, model, batch):
        steps.append(len(batch[1]))
        if len(steps) == 7:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    monkeypatch.setattr(Classification, "loss", counted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, cpu=True)
    train(recipe, tmp_path, cpu=True, resume=True)
    assert steps == [4] * (7 + 2), "two epochs of four batches, of which one was seen twice"


def test_a_stream_cannot_be_kept_on_the_device(forms, recipe, tmp_path):
    settings = forms["shards"] | {"cache": "device", "augmentation": "none"}
    with pytest.raises(InputError, match="cache: device keeps what a stream would not; leave cache out"):
        train(recipe.merged(settings), tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def write_kinds(photographs, folder):
    """Write photographs as grey, 16-bit, RGBA, CMYK and 1x1 pictures, and three that are none."""
    for index, (name, content) in enumerate(photographs):
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGB").resize((48, 40))
        deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        kinds = [image, image.convert("L"), deep, image.convert("RGBA"), image.convert("CMYK"), image.resize((1, 1))]
        picture = kinds[index % len(kinds)]
        file = folder / name / f"{index}.{'jpg' if picture.mode == 'CMYK' else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    first, second, third, *_ = sorted(folder.glob("*/*"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:100])
    third.write_text("no picture")


@pytest.mark.parametrize("limit", [0, 2, 3])
def test_a_run_takes_pictures_of_every_kind_and_leaves_out_so_many_that_are_none(
    data_dir, recipe, tmp_path, capfd, limit
):
    photographs = read_photographs(data_dir, COUNT)
    write_kinds(photographs, tmp_path / "data" / "train")
    write_folders(photographs, tmp_path / "data" / "val")
    settings = {"dataset": "", "data_dir": str(tmp_path / "data"), "augmentation": "pad_crop", "epochs": 2}
    if limit < 3:
        with pytest.raises(OSError, match=r"unreadable image .*/train/.*; (2 were left out before|replace or remove)"):
            train(recipe.merged({**settings, "max_unreadable": limit}), tmp_path / "run", cpu=True)
        return
    row = train(recipe.merged({**settings, "max_unreadable": limit}), tmp_path / "run", cpu=True)
    told = capfd.readouterr().err
    assert row["train_loss"] > 0 and told.count("left out: unreadable image") == 3  # once each, in two epochs
    assert "(3 of at most 3)" in told
