"""ImageNet weights of an installed package: no network is needed, and without the package the error names it."""

import socket
import tarfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor

import timm_deconv  # noqa: F401 registers the models
from timm_deconv.errors import InputError
from timm_deconv.models import weights
from timm_deconv.models.pretrained import create_batch_norm

LITE = ("tf_efficientnet_lite0", "tf_efficientnet_lite2")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def photographs(data_dir: Path) -> Tensor:
    transform = timm.data.create_transform((3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    with tarfile.open(data_dir / "imagenet-sample" / "images.tar.gz") as tar:
        files = [member for _, member in zip(range(9), tar, strict=False) if member.name.endswith(".jpg")]
        return torch.stack([transform(Image.open(tar.extractfile(file)).convert("RGB")) for file in files])


@pytest.mark.parametrize("name", LITE)
def test_the_network_names_photographs_as_the_packages_batch_norm_network_does(name: str, photographs: Tensor) -> None:
    model = timm.create_model(f"{name}_deconv", pretrained=True).eval()
    with torch.no_grad():
        expected = create_batch_norm(name).eval()(photographs)
        found = model(photographs)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert (found.argmax(1) == torch.arange(len(photographs))).float().mean() >= 0.5, "one photograph of each class"


def test_classes_channels_and_features_can_be_others(photographs: Tensor) -> None:
    name = "tf_efficientnet_lite0_deconv"
    reference = timm.create_model(name, pretrained=True, features_only=True).eval()
    grey = photographs.mean(1, keepdim=True)
    with torch.no_grad():
        for options, images, like in (
            ({"num_classes": 7}, photographs, photographs),
            ({"in_chans": 1, "deconv": "fast"}, grey, grey.expand(-1, 3, -1, -1)),
        ):
            model = timm.create_model(name, pretrained=True, **options).eval()
            wanted = reference(like)[-1]
            found = model.forward_intermediates(images, indices=[4], intermediates_only=True)[0]
            assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
            assert model(images).shape == (len(images), options.get("num_classes", 1000))


def test_saved_configuration_does_not_point_into_the_package(tmp_path: Path) -> None:
    model = timm.create_model("tf_efficientnet_lite0_deconv", pretrained=True)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert "efficientnet-lite0" not in (tmp_path / "config.json").read_text()
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_other_weights_are_not_replaced_by_the_packages(tmp_path: Path) -> None:
    source = timm.create_model("tf_efficientnet_lite0_deconv")
    torch.save(source.state_dict(), tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth")}
    model = timm.create_model("tf_efficientnet_lite0_deconv", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.conv_stem.weight, source.conv_stem.weight)


def test_without_package_and_network_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_installed", lambda package: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for create in (
        lambda: timm.create_model("tf_efficientnet_lite0_deconv", pretrained=True),
        lambda: create_batch_norm("tf_efficientnet_lite0"),
    ):
        with pytest.raises(InputError, match=r"pip install 'timm-deconv\[lite\]'") as error:
            create()
        assert "\n" not in str(error.value)


def test_the_extra_that_the_error_names_brings_the_package() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for package in weights.PACKAGES.values():
        extra = project["optional-dependencies"][weights.EXTRA.partition("[")[2].rstrip("]")]
        assert any(requirement.startswith(package.distribution) for requirement in extra)


@pytest.mark.parametrize("name", LITE)
def test_an_installed_file_of_other_contents_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    package = weights.PACKAGES[name]
    file = tmp_path / package.file
    torch.save(timm.create_model(name).state_dict(), file)
    monkeypatch.setattr(weights, "_installed", lambda _package: file)
    for create in (
        lambda: timm.create_model(f"{name}_deconv", pretrained=True),
        lambda: create_batch_norm(name),
    ):
        with pytest.raises(InputError, match=rf"{package.file} .* another file than the known one \(sha256 ") as error:
            create()
        assert "\n" not in str(error.value)
