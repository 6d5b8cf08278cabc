"""`list` and `info`."""

import json
from collections import Counter

import pytest
import timm

from tests.golden_files import golden_folder
from timm_deconv.models.description import layers_of
from timm_deconv.models.weights import save_network

GOLDEN = json.loads((golden_folder() / "architectures.json").read_text())


def test_list_takes_patterns_and_knows_what_has_weights(command):
    names = {line.split()[0] for line in command("list").output.splitlines()[1:]}
    assert set(timm.list_models("*_deconv")) < names and not {"resnet18", "deconv"} & names
    assert command("list", "segm*").output.splitlines()[1:] == ["segmenter  nd_camvid"]
    assert {line.split()[0] for line in command("list", "vgg1?_cifar").output.splitlines()[1:]} == {
        f"vgg{depth}_cifar" for depth in (11, 13, 16, 19)
    }
    listed = json.loads(command("list", "*resnet50_deconv", "--json").output)
    tags = {each["network"]: [weights["tag"] for weights in each["weights"]] for each in listed}
    assert tags["resnet50_deconv"][0] == "bn_a1_in1k" and tags["deeplabv3_resnet50_deconv"] == []
    trained = command("list", "*resnet50_deconv", "--pretrained").output.splitlines()[1:]
    assert {line.split()[0] for line in trained} == set(timm.list_pretrained("*resnet50_deconv"))


def test_a_pattern_that_no_network_matches_is_answered_with_the_nearest(command):
    done = command("list", "resnt18_cifar")
    assert done.status == 1 and "no network 'resnt18_cifar'; nearest: " in done.errors and not done.output


@pytest.mark.parametrize("name", ["resnet18_cifar", "mobilenetv2_cifar", "vgg11_cifar"])
def test_info_counts_what_the_published_networks_have(name, command):
    golden = GOLDEN["cifar"][name.removesuffix("_cifar")]
    twin, whitened = (json.loads(command("info", each, "--json").output) for each in (name, f"{name}_deconv"))
    assert (twin["parameters"], twin["macs"]) == (golden["batch_norm"]["parameters"], golden["batch_norm"]["macs"])
    assert whitened["macs"] == twin["macs"]
    assert len(whitened["layers"]) == golden["batch_norm"]["plain_layers"]
    assert {layer["settings"] for layer in twin["layers"]} == {"none"}
    counted = Counter(layer["role"] for layer in whitened["layers"])
    assert counted == {role["role"]: role["layers"] for role in whitened["roles"]}
    model = timm.create_model(f"{name}_deconv")
    assert whitened["bytes_training"] == 4 * sum(value.numel() for value in model.state_dict().values())
    assert whitened["bytes_half"] == whitened["bytes_folded"] / 2 < whitened["bytes_training"] / 2


@pytest.mark.parametrize("name", ["segmenter", "segmenter.nd_camvid"])
def test_info_describes_the_network_that_a_tags_weights_need(name, command):
    about, model = json.loads(command("info", name, "--json").output), timm.create_model(name, pretrained=True)
    assert about["classes"] == 11 and about["image_size"] == [180, 240]
    assert about["parameters"] == sum(value.numel() for value in model.parameters())
    assert [layer.settings for layer in layers_of(model)] == [layer["settings"] for layer in about["layers"]]
    assert [weights["tag"] for weights in about["weights"]] == ["nd_camvid"]


def test_info_shows_blocks_settings_by_role_and_weights(command):
    shown = command("info", "seresnet50_deconv", "--image-size", "160").output
    assert "layer2.1.conv1         pointwise       Deconv2d      128 x 512 x 1 x 1    8 x 64\n" in shown
    assert "squeeze_excite      32  none\n" in shown and "classifier           1  block=512" in shown
    assert "1000 classes, images of 160 x 160\n" in shown and "hf-hub:timm/seresnet50.a1_in1k\n" in shown


def test_info_names_the_weights_of_a_folder_not_those_of_its_architecture(command, tmp_path):
    save_network(timm.create_model("resnet18_025_cifar_deconv"), tmp_path)
    for name in (tmp_path, f"local-dir:{tmp_path}"):
        (weights,) = json.loads(command("info", name, "--json").output)["weights"]
        assert weights["from"] == f"file {tmp_path}/model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    assert json.loads(command("info", tmp_path, "--json").output)["weights"] == []


def test_info_describes_a_saved_network_without_its_weights(command, tmp_path):
    save_network(timm.create_model("resnet18_cifar_deconv", width=0.125, num_classes=3, in_chans=1), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    about = json.loads(command("info", tmp_path, "--json").output)
    assert about["network"] == "resnet18_cifar_deconv" and about["classes"] == 3
    assert about["layers"][0]["shape"] == "8 x 1 x 3 x 3" and about["weights"] == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("resnet18_cifar_decnv", "no model or folder 'resnet18_cifar_decnv'; nearest: "),
        ("runs/nowhere/here", "no folder runs/nowhere/here"),
        ("local-dir:nowhere", "local-dir:nowhere cannot be had"),
        ("hf-hub:one/two/three", "hf-hub:one/two/three cannot be had (HFValidationError "),
        ("foo:bar", "foo:bar cannot be had (ValueError Unknown model source 'foo'"),
    ],
)
def test_a_network_that_is_not_there_is_named_in_one_line(name, line, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["info", name], ["predict", name, "."], ["calibrate", name, "digits", "new"]):
        (tmp_path / "cat.png").touch()
        done = command(*words)
        assert done.status == 1 and line in done.errors and done.errors.count("\n") == 1 and not done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png"]


@pytest.mark.parametrize(
    ("size", "line"),
    [(-5, "image size -5: it is a positive"), (0, "image size 0: it is a positive"), (2, "images of 2 x 2 cannot be")],
)
def test_a_size_that_a_network_cannot_take_is_said_in_one_line(size, line, command):
    done = command("info", "vgg11_cifar_deconv", f"--image-size={size}")
    assert (done.status, done.output) == (1, "") and line in done.errors and done.errors.count("\n") == 1
