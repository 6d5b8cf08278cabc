"""timm's contract on every deconvolution name.

Contracts are checked with a block a stage, on one network of each kind in blocks of 16 channels (what settings change)
and on all others with default settings; at full depth every network runs forward.
"""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_deconv
from tests.models.test_twins import ONE_BLOCK_A_STAGE, layers
from tests.models.timm_contract import (
    CHECKS,
    DENSE_CHECKS,
    Subject,
    check_backward,
    check_default_cfg,
    check_forward,
    check_fx,
    check_grad_checkpointing,
    check_groups,
    check_pretrained,
    check_reparameterize,
    check_round_trip,
    check_torchscript,
)
from timm_deconv import Deconv2d, DeconvLinear

Check = Callable[[Subject], None]
BY_NAME: tuple[Check, ...] = (check_forward, check_default_cfg, check_groups, check_pretrained, check_round_trip)
"""What can differ between two names of one class and shape, as both DeepLabs are with a block a stage."""

BY_SETTINGS: tuple[Check, ...] = (
    *(check_forward, check_backward, check_grad_checkpointing, check_torchscript, check_fx),
    *(check_pretrained, check_round_trip, check_reparameterize),
)
"""What can differ between two settings of a network; the others speak of its structure."""

QUICK: dict[str, Any] = {"deconv": {"preset": "paper", "block": 16}}
CIFAR = [name for name in timm_deconv.list_models() if name.endswith("_cifar_deconv")]
DENSE = ["deeplabv3_resnet50_deconv", "deeplabv3_resnet101_deconv", "fcn_resnet50_deconv"]
SHALLOW: dict[str, Any] = {"layers": (1, 1, 1, 1)}
NARROW: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
SHALLOW_CIFAR = {f"{name}_deconv": arguments for name, arguments in ONE_BLOCK_A_STAGE.items()}

SMALL: dict[str, dict[str, Any]] = {
    "densenet121_deconv": {"block_config": (1, 1, 1, 1)},
    "dpn68_deconv": {"k_sec": (1, 1, 1, 1), "k_r": 32},
    "legacy_seresnet18_deconv": SHALLOW,
    "mobilenetv2_050_deconv": {},
    "resnet18_deconv": NARROW,
    "resnetv2_50_deconv": {"layers": (1, 1, 1, 1), "channels": (64, 128, 256, 512)},
    "resnext50_32x4d_deconv": NARROW,
    "seresnet50_deconv": NARROW,
}
"""One ImageNet network of each kind of class, as small as its arguments allow."""

OTHERS = [name for name in timm_deconv.list_models() if name not in (*CIFAR, *DENSE, *SMALL)]
SHALLOW_ARGUMENTS: dict[str, dict[str, Any]] = {
    "densenet": {"block_config": (1, 1, 1, 1)},
    "dpn": {"k_sec": (1, 1, 1, 1)},
    "legacy_": SHALLOW,
    "resne": NARROW,
}
"""What makes a block a stage of the other ImageNet networks, by the start of their names; EfficientNets and MobileNets
take no such argument and get it by a fixture."""
HUGE = ("vgg", "pnasnet5large")
"""Those that cannot be made small."""
NO_CHECKPOINTING = ("legacy_", "pnasnet5")
"""timm's classes that refuse `set_grad_checkpointing`."""
NO_TORCHSCRIPT = ("densenet", "dpn")
"""timm's own tests leave these out."""


def subject(name: str, kwargs: dict[str, Any], size: int | None = None) -> Subject:
    return Subject(name, kwargs, size, checkpointing=not name.startswith(NO_CHECKPOINTING))


def applies(name: str, check: Check) -> bool:
    if name.endswith("_cifar_deconv"):
        return True
    refused = {check_grad_checkpointing: NO_CHECKPOINTING, check_torchscript: NO_TORCHSCRIPT}
    return not name.startswith(refused.get(check, ("-",)))


def pairs(names: list[str], checks: tuple[Check, ...]) -> list[Any]:
    applying = ((name, check) for name in names for check in checks if applies(name, check))
    return [pytest.param(name, check, id=f"{name}-{check.__name__}") for name, check in applying]


@pytest.mark.parametrize(("name", "check"), pairs(list(SHALLOW_CIFAR), BY_SETTINGS))
def test_timm_contract_at_32x32(name: str, check: Check) -> None:
    check(subject(name, {"width": 0.25, **SHALLOW_CIFAR[name], **QUICK}))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), pairs(CIFAR, CHECKS))
def test_timm_contract_at_32x32_with_default_settings(name: str, check: Check) -> None:
    check(subject(name, {"width": 0.25, **SHALLOW_CIFAR.get(name, {})}))


@pytest.mark.parametrize(("name", "check"), pairs(list(SMALL), CHECKS))
def test_timm_contract_at_imagenet_scale(name: str, check: Check) -> None:
    check(subject(name, {**SMALL[name], **QUICK}, 64))


@pytest.mark.parametrize(("name", "check"), pairs(["fcn_resnet50_deconv"], DENSE_CHECKS))
def test_timm_contract_of_dense_networks(name: str, check: Check) -> None:
    check(subject(name, {**SHALLOW, **QUICK}, 33))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), pairs(DENSE[:1], DENSE_CHECKS) + pairs(DENSE[1:2], BY_NAME))
def test_timm_contract_of_deeplab(name: str, check: Check) -> None:
    check(subject(name, {**SHALLOW, **QUICK}, 33))


@pytest.fixture
def one_block_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's EfficientNets and MobileNets are made with the first block of each stage alone."""
    monkeypatch.setattr(
        "timm.models.efficientnet.decode_arch_def",
        lambda *args, **kwargs: [stage[:1] for stage in decode_arch_def(*args, **kwargs)],
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_block_a_stage")
@pytest.mark.parametrize(("name", "check"), pairs([name for name in OTHERS if not name.startswith(HUGE)], CHECKS))
def test_timm_contract_of_other_imagenet_networks(name: str, check: Check) -> None:
    shallow = next((kwargs for start, kwargs in SHALLOW_ARGUMENTS.items() if name.startswith(start)), {})
    check(subject(name, shallow, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_imagenet_networks_run_at_full_depth(name: str) -> None:
    check_forward(subject(name, {}, 64))


def test_no_name_is_left_out() -> None:
    assert sorted([*CIFAR, *DENSE, *SMALL, *OTHERS]) == timm_deconv.list_models()
    assert set(timm_deconv.list_models()) <= set(timm.list_models("*_deconv"))
    assert len(timm_deconv.list_models()) == 52


def twin_of(name: str) -> str:
    source = name.removesuffix("_deconv")
    return f"{source}_bn" if source.startswith("vgg") and not source.endswith("_cifar") else source


MANY_LAYERS = (
    *("deeplabv3_resnet101", "densenet161", "densenet169", "densenet201", "dpn9", "efficientnet_b1", "efficientnetv2"),
    *("legacy_senet154", "pnasnet5large", "resnet101", "resnext101", "tf_efficientnet_lite", "tf_efficientnetv2"),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n.startswith(MANY_LAYERS) else ()) for n in timm_deconv.list_models()],
)
def test_every_layer_is_whitened_and_biases_replace_the_norms(name: str) -> None:
    with torch.device("meta"):
        twin, model = timm.create_model(twin_of(name)), timm.create_model(name, deconv="paper")
    assert not layers(model, _BatchNorm)
    assert all(isinstance(layer, Deconv2d | DeconvLinear) for layer in layers(model, (nn.Conv2d, nn.Linear)))
    expected = sum(p.numel() for p in twin.parameters())
    expected -= sum(2 * norm.num_features for norm in layers(twin, _BatchNorm))
    expected += sum(layer.weight.shape[0] for layer in layers(twin, (nn.Conv2d, nn.Linear)) if layer.bias is None)
    assert sum(p.numel() for p in model.parameters()) == expected
