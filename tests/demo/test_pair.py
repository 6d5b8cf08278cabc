"""Which two networks stand side by side."""

import inspect
from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from tests.demo.pairs import CLASSES, small_pair
from timm_deconv.cli.demo import demo
from timm_deconv.data.pictures import read_picture
from timm_deconv.demo import Pair, load_pair
from timm_deconv.errors import InputError
from timm_deconv.models.weights import save_network

GREY = Image.new("RGB", (300, 240), "grey")


def test_the_networks_of_the_command_come_along_and_both_know_the_cat_of_the_page() -> None:
    pair = load_pair(inspect.signature(demo).parameters["model"].default)
    assert not pair.carried_over
    assert all("_cifar10" in name for name in pair.names)
    content = (files("timm_deconv.demo") / "page" / "cat.jpg").read_bytes()
    found = pair.compare(read_picture(content))
    assert all(pair.classes[int(each.argmax())] == "cat" for each in (found.deconv, found.twin))
    assert not torch.equal(found.deconv, found.twin)


def test_imagenet_weights_of_a_package_and_their_twin_answer_alike() -> None:
    pair = load_pair("tf_efficientnet_lite0_deconv")
    assert pair.names == ("tf_efficientnet_lite0_deconv.bn_in1k", "tf_efficientnet_lite0.in1k")
    assert pair.carried_over
    found = pair.compare(GREY)
    assert (found.deconv - found.twin).abs().max() < 1e-4
    assert len(pair.classes) == 1000
    assert pair.classes[0].startswith("tench")


def test_runs_are_compared_by_their_folders(tmp_path: Path) -> None:
    for name in ("resnet18_025_cifar_deconv", "resnet18_025_cifar"):
        model = timm.create_model(name)
        model.pretrained_cfg["label_names"] = CLASSES
        save_network(model, tmp_path / name)
    pair = load_pair(str(tmp_path / "resnet18_025_cifar_deconv"), str(tmp_path / "resnet18_025_cifar"))
    model.eval()
    image = timm.data.create_transform(**timm.data.resolve_data_config(model=model))(GREY)
    with torch.no_grad():
        expected = model(image[None]).softmax(1)[0]
    assert torch.allclose(pair.compare(GREY).twin, expected, atol=1e-6)
    assert pair.classes == CLASSES


def test_networks_that_cannot_be_compared_are_refused() -> None:
    deconv, twin = (timm.create_model(f"resnet18_025_cifar{form}") for form in ("_deconv", ""))
    masks = timm.create_model("segmenter", base="test_resnet", deconv="fast", num_classes=3)
    for first, second, message in (
        (twin, twin, "first layer of resnet18_025_cifar does not whiten"),
        (deconv, timm.create_model("resnet18_025_cifar", num_classes=3), "cifar has 3 classes .* networks of one task"),
        (timm.create_model("resnet18_025_cifar_deconv", num_classes=0), twin, "no classifier"),
        (masks, twin, "segmenter is for masks"),
    ):
        with pytest.raises(InputError, match=message):
            Pair(first, second)


def test_a_twin_that_cannot_be_had_is_asked_for(tmp_path: Path) -> None:
    save_network(timm.create_model("deconv", base="test_resnet"), tmp_path)
    with pytest.raises(InputError, match="the twin of deconv is not known by its name; give it by --twin"):
        load_pair(str(tmp_path))


def test_the_whitening_of_a_network_is_not_changed_by_what_is_shown() -> None:
    pair = small_pair()
    before = {name: value.clone() for name, value in pair.stem.state_dict().items()}
    pair.compare(GREY)
    assert all(torch.equal(value, before[name]) for name, value in pair.stem.state_dict().items())
