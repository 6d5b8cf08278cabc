"""Every recipe of the package runs: a step or two of a tiny network, on real pictures."""

import gzip
import re
import shutil

import pytest
import timm
from safetensors.torch import save_file

from tests.pictures import read_cifar, read_photographs, write_camvid, write_cityscapes, write_folders
from timm_deconv.resources import recipe_files
from timm_deconv.training import load_recipe
from timm_deconv.training.loop import train

SMOKE = {"epochs": 1, "batch_size": 4, "workers": 0, "dataset_download": False, "warmup_epochs": 0}
NARROW = {"model": "resnet18_cifar_deconv", "model_kwargs": {"width": 0.125}}
TINY = {"model": "test_resnet", "model_kwargs": {}}
ENCODER = {"model": "test_resnet", "model_kwargs": {"deconv": {"block": 32}}}
FEW = {"train_images": 8, "val_images": 8}

CIFAR = {**NARROW, **FEW, "num_classes": 10}
IMAGENET = {**TINY, "num_classes": 16, "input_size": (3, 64, 64)}
MASKS = {**ENCODER, "input_size": (3, 64, 64)}
FINETUNE = {
    "input_size": (3, 32, 32),
    "train_images": 64,
    "calibration_images": 64,
    "batch_size": 32,
    "pretrained": False,
}

RECIPES = {
    **{f"cifar{classes}_e{epochs}": ("cifar", CIFAR) for classes in (10, 100) for epochs in (1, 20, 100)},
    "imagenet_e90": ("photographs", IMAGENET),
    "imagenet_modern": ("photographs", IMAGENET | {"epochs": 3, "progressive_sizes": (32, 48, 64)}),
    "cityscapes_e30": ("cityscapes", MASKS),
    "camvid": ("camvid", MASKS),
    "finetune_segmentation": ("camvid", MASKS | {"calibration_images": 0, "pretrained": False}),
    "mnist": ("mnist", NARROW | FEW),
    "fashion_mnist": ("fashion_mnist", NARROW | FEW),
    "digits": (None, NARROW | FEW),
    "finetune": ("cifar", CIFAR | FINETUNE),
}
"""Where the pictures are, and what is smaller than in the recipe."""


@pytest.fixture(scope="module")
def pictures(data_dir, tmp_path_factory):
    """Makes the folder of a data set at its first use."""
    made = {}

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        if name in ("cifar", "photographs"):
            found = read_cifar(data_dir, 7) if name == "cifar" else read_photographs(data_dir, 16)
            for part in ("train", "val"):
                write_folders(found, folder / part)
        elif name == "camvid":
            write_camvid(data_dir, folder, train=8, val=4)
        elif name == "cityscapes":
            write_cityscapes(get("camvid"), folder)
        else:  # which have the same form
            raw = folder / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
            raw.mkdir(parents=True)
            for packed in (data_dir / "FashionMNIST" / "raw").glob("*.gz"):
                with gzip.open(packed) as source, (raw / packed.stem).open("wb") as target:
                    shutil.copyfileobj(source, target)
        return folder

    def get(name):
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


def test_there_is_a_smoke_run_of_every_recipe():
    assert sorted(RECIPES) == sorted(recipe_files())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_runs_on_real_pictures(name, pictures, tmp_path):
    data, smaller = RECIPES[name]
    settings = SMOKE | smaller | ({} if data is None else {"data_dir": str(pictures(data))})
    if name == "finetune":
        save_file(timm.create_model("resnet18_cifar", width=0.125).state_dict(), tmp_path / "start.safetensors")
        settings["pretrained_path"] = str(tmp_path / "start.safetensors")
    recipe = load_recipe(name).merged(settings)
    row = train(recipe, tmp_path / "run", cpu=True)
    assert row["recipe"] == name and row["train_loss"] > 0
    assert timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).num_classes == recipe.num_classes


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_says_how_it_is_run_how_long_it_takes_and_what_comes_of_it(name):
    comments = [line for line in recipe_files()[name].read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.removeprefix("# ") for line in comments)
    assert re.search(rf"Run: (accelerate launch|python) scripts/train.py {name}\b", text)
    assert re.search(r"(Time: .*\. Result: not run here|Time and result: .*%.* row)", text)
