"""What `deconv=` adds to timm's models: settings, saved and kept by a new classifier; statistics in training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import _efficientnet_blocks as timm_blocks
from timm.models import save_for_hf
from torch import Tensor, nn

from tests.models.test_twins import layers
from tests.models.timm_contract import same
from timm_deconv import Deconv2d, DeconvLinear
from timm_deconv.layers import WhiteningMixin
from timm_deconv.models.mobilenetv2 import InvertedResidual

CIFAR_KWARGS: dict[str, Any] = {"width": 0.25, "num_classes": 5}
SHALLOW: dict[str, Any] = {"layers": (1, 1, 1, 1)}
Network = tuple[str, dict[str, Any], int]
NETWORKS: list[Network] = [
    ("pnasnet_a_cifar_deconv", CIFAR_KWARGS, 32),
    ("mobilenetv2_cifar_deconv", CIFAR_KWARGS, 32),
    ("resnet18_deconv", {**SHALLOW, "channels": (16, 32, 64, 128)}, 64),
    ("densenet121_deconv", {"block_config": (1, 1, 1, 1)}, 64),
    ("dpn68_deconv", {"k_sec": (1, 1, 1, 1), "k_r": 32}, 64),
    ("fcn_resnet50_deconv", SHALLOW, 33),
]
BY_NAME = {"argvalues": NETWORKS, "ids": [name for name, _, _ in NETWORKS]}


def train_one_step(model: nn.Module, size: int) -> Tensor:
    """A step that moves weights and statistics; returns the images."""
    x = torch.randn(4, 3, size, size)
    model.train()(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad / (1e-6 + parameter.grad.norm())
    model.eval()
    return x


SETTINGS = [(*network, {"block": 16}) for network in NETWORKS] + [(*network, "paper") for network in NETWORKS[:2]]


@pytest.mark.parametrize(("name", "kwargs", "size", "deconv"), SETTINGS)
def test_a_trained_network_comes_back_with_its_settings(
    name: str, kwargs: dict[str, Any], size: int, deconv: Any, tmp_path: Path
) -> None:
    model = timm.create_model(name, deconv=deconv, **kwargs)
    x = train_one_step(model, size)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert [m.cfg for m in layers(back, WhiteningMixin)] == [m.cfg for m in layers(model, WhiteningMixin)]
    with torch.no_grad():
        same(back(x), model(x))


@pytest.mark.parametrize(("name", "kwargs", "size"), **BY_NAME)
def test_a_new_classifier_is_whitened_like_the_old_one(name: str, kwargs: dict[str, Any], size: int) -> None:
    model = timm.create_model(name, deconv={"block": 16}, **kwargs)
    old = model.get_classifier()
    model.reset_classifier(3)
    new = model.get_classifier()
    assert isinstance(new, Deconv2d if name.startswith(("dpn", "fcn")) else DeconvLinear)
    assert new is not old
    assert (new.cfg, new.blocks) == (old.cfg, old.blocks)
    assert model(torch.randn(2, 3, size, size)).shape[:2] == (2, 3)


def test_a_new_auxiliary_classifier_is_whitened_too() -> None:
    with torch.device("meta"):
        model = timm.create_model("fcn_resnet50_deconv", aux_head=True, **SHALLOW)
    old = model.aux_classifier
    model.reset_classifier(3)
    assert isinstance(model.aux_classifier, Deconv2d)
    assert model.aux_classifier.out_channels == 3
    assert (model.aux_classifier.cfg, model.aux_classifier.blocks) == (old.cfg, old.blocks)


@pytest.mark.parametrize(("name", "kwargs", "size"), **BY_NAME)
def test_recomputed_activations_are_counted_once(name: str, kwargs: dict[str, Any], size: int) -> None:
    plain = timm.create_model(name, deconv={"block": 16}, **kwargs, drop_rate=0.0).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(4, 3, size, size)
    for model in (plain, saving):
        model(x).square().mean().backward()
    assert {int(layer.num_batches_tracked) for layer in layers(saving, WhiteningMixin)} == {1}
    for (key, a), b in zip(saving.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")
    for (key, a), b in zip(saving.named_parameters(), plain.parameters(), strict=True):
        atol = 1e-4 * float(b.grad.abs().max())
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def test_what_the_user_asks_for_wins_over_the_family() -> None:
    deconv = {"preset": "paper", "roles": {"depthwise": {"n_iter": 4}, "stem": {"freeze": False}}}
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_cifar_deconv", deconv=deconv)
    assert (model.stem.conv.cfg.freeze, model.stem.conv.cfg.n_iter) == (False, 10)
    for block in layers(model, InvertedResidual):
        assert (block.depthwise.conv.cfg.n_iter, block.project.conv.cfg.n_iter) == (4, 1)


def test_options_and_roles_of_the_user_win_over_a_familys_roles_and_patterns() -> None:
    deconv = {"preset": "paper", "n_iter": 2, "block": 8, "roles": {"block_end": {"n_iter": 3}}}
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_cifar_deconv", deconv=deconv)
    assert (model.stem.conv.cfg.freeze, model.stem.conv.cfg.n_iter) == (True, 2)
    for block in layers(model, InvertedResidual):
        assert (block.depthwise.conv.cfg.n_iter, block.project.conv.cfg.block) == (2, 8)
        assert block.project.conv.cfg.n_iter == 3 or not block.residual
    assert model.get_classifier().cfg.block == 8


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("mobilenetv2_cifar_deconv", {"width": 0.25}), ("mobilenetv2_140_deconv", {}), ("efficientnetv2_rw_s_deconv", {})],
)
def test_projections_take_one_step_in_blocks_as_wide_as_their_block_s_input(name: str, kwargs: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, deconv="paper", **kwargs)
    projections = [(block.expand.conv, block.project.conv) for block in layers(model, InvertedResidual)]
    projections += [(block.conv_pw, block.conv_pwl) for block in layers(model, timm_blocks.InvertedResidual)]
    projections += [(block.conv_exp, block.conv_pwl) for block in layers(model, timm_blocks.EdgeResidual)]
    projections += [(block.conv_dw, block.conv_pw) for block in layers(model, timm_blocks.DepthwiseSeparableConv)]
    assert len(projections) >= 17
    for first, projection in projections:
        assert projection.cfg.n_iter == 1
        assert projection.blocks.features == first.in_channels


def photographs(batch: int, size: int) -> Tensor:
    """Smooth random pictures with alike colours, roughly normalised: what a network's input looks like."""
    coarse = torch.randn(batch, 1, 4, 4) + 0.3 * torch.randn(batch, 3, 4, 4)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return smooth + 0.1 * torch.randn(batch, 3, size, size)


def test_image_pooling_stays_of_ordinary_size_at_batch_2() -> None:
    model = timm.create_model("deeplabv3_resnet50_deconv", **SHALLOW).train()
    branches = model.decoder[0].branches
    sizes: dict[int, float] = {}
    for i, branch in enumerate(branches):
        branch.register_forward_hook(lambda _m, _i, out, i=i: sizes.__setitem__(i, float(out.detach().abs().max())))
    output = model(photographs(2, 65))
    assert output.isfinite().all()
    output.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not any(bool(layer.saw_nonfinite) for layer in layers(model, WhiteningMixin))
    assert sizes[len(branches) - 1] < 3 * max(sizes[i] for i in range(len(branches) - 1))
    assert float(output.detach().abs().max()) < 100
