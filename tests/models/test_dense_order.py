"""The 32x32 DenseNet's order of channels: new ones in front, as published; weights of before keep theirs behind."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn

import timm_deconv  # noqa: F401 (registers the networks)
from timm_deconv.errors import InputError
from timm_deconv.models.densenet import DenseLayer
from timm_deconv.training import load_recipe
from timm_deconv.training.loop import train
from timm_deconv.training.tasks import Classification

SMALL: dict[str, Any] = {"layers": (2, 2, 2, 2), "width": 0.5}
NAMES = ("densenet121_cifar", "densenet121_cifar_deconv")


def restated(net: Any, x: Tensor, new_in_front: bool = True) -> Tensor:
    """Reference notes, section 7: no norm anywhere, ReLU where norm and ReLU were, a final ReLU, plain pooling."""
    x = net.stem(x)
    for stage in net.stages:
        for block in stage:
            if isinstance(block, DenseLayer):
                new = block.conv2(F.relu(block.conv1(F.relu(x))))
                x = torch.cat([new, x] if new_in_front else [x, new], 1)
            else:
                x = F.avg_pool2d(block.conv(F.relu(x)), 2)
    return net.head.fc(F.relu(x).mean((2, 3)))


def gradients(model: nn.Module, output: Tensor, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), [x, *model.parameters()]))


def test_the_paper_preset_is_the_published_dense_network_in_training_and_evaluation() -> None:
    torch.manual_seed(0)
    net = (
        timm.create_model("densenet121_cifar_deconv", deconv="paper", layers=(2, 2, 2, 2), width=0.25).double().train()
    )
    same, other = copy.deepcopy(net), copy.deepcopy(net)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    found, expected = net(x), restated(same, x)
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (found - restated(other, x, new_in_front=False)).abs().max() > 0.1 * expected.abs().max()
    for ours, theirs in zip(gradients(net, found, x), gradients(same, expected, x), strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    assert torch.equal(net.eval()(x), restated(same.eval(), x))


def saved_before(name: str, folder: Path, **options: Any) -> nn.Module:
    """A network in the order of version 0.1.0, saved as that version did."""
    network = timm.create_model(name, new_in_front=False, **SMALL, **options)
    network.train()(torch.randn(8, 3, 32, 32))
    save_for_hf(network, str(folder), safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]["new_in_front"]
    (folder / "config.json").write_text(json.dumps(config))
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), [(NAMES[0], {}), (NAMES[1], {}), ("deconv", {"base": NAMES[0]})])
def test_a_folder_of_before_evaluates_as_before_and_is_saved_with_its_order(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    before = saved_before(name, tmp_path / "old", **options)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        loaded = timm.create_model(f"local-dir:{tmp_path / 'old'}", pretrained=True).eval()
        assert torch.equal(loaded(x), before(x))
        save_for_hf(loaded, str(tmp_path / "old"), safe_serialization=True)
    file = {"file": str(tmp_path / "old" / "model.safetensors")}
    beside = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, **SMALL, **options).eval()
    assert torch.equal(beside(x), before(x))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_now_says_its_order(tmp_path: Path, name: str) -> None:
    network = timm.create_model(name, **SMALL).eval()
    save_for_hf(network, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["new_in_front"] is True
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), network(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_front", [True, False])
def test_torchs_files_of_the_other_order_are_refused_and_change_nothing(
    tmp_path: Path, name: str, in_front: bool
) -> None:
    torch.save(timm.create_model(name, new_in_front=in_front, **SMALL).state_dict(), tmp_path / "weights.pth")
    weights = torch.load(tmp_path / "weights.pth")
    timm.create_model(name, new_in_front=in_front, **SMALL).load_state_dict(weights)
    other = timm.create_model(name, new_in_front=not in_front, **SMALL)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(InputError, match=f"create the network with new_in_front={in_front}") as error:
        other.load_state_dict(weights)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


class Stop(Exception):
    pass


class OneEpoch(Classification):
    """Ends a run in its second epoch."""

    epochs = 0

    def create_model(self) -> nn.Module:
        self.epochs = 0
        return super().create_model()

    def summarise(self, total: Tensor, images: int) -> Mapping[str, float]:
        self.epochs += 1
        if self.epochs > 2:  # each epoch is summed up in training and in evaluation
            raise Stop
        return super().summarise(total, images)


def test_a_run_of_before_goes_on_in_its_order(tmp_path: Path) -> None:
    arguments = {"layers": [1, 1], "width": 0.25}
    settings = {"model": NAMES[1], "model_kwargs": arguments, "train_images": 128, "val_images": 64, "batch_size": 64}
    recipe = load_recipe("digits").merged({**settings, "epochs": 2, "log_interval": 1000, "model_ema": True})
    old = recipe.merged({"model_kwargs": {**arguments, "new_in_front": False}})
    expected = train(old, tmp_path / "whole", cpu=True)
    folder = tmp_path / "halves"
    with pytest.raises(Stop):
        train(old, folder, cpu=True, task=OneEpoch)
    (folder / "recipe.yaml").write_text(recipe.yaml())
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]["new_in_front"]
    (folder / "config.json").write_text(json.dumps(config))
    resumed = train(recipe, folder, cpu=True, resume=True)
    assert (resumed["top1"], resumed["train_loss"]) == (expected["top1"], expected["train_loss"])
    assert json.loads((folder / "config.json").read_text())["model_args"]["new_in_front"] is False
