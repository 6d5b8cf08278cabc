"""timm's contract on every deconvolution name.

The quick form has few layers and whitens blocks of 16 channels; full depth with default settings, and what is large
anyway, is slow.
"""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_deconv
from tests.models.test_twins import layers
from tests.models.timm_contract import (
    CHECKS,
    DENSE_CHECKS,
    Subject,
    check_forward,
    check_grad_checkpointing,
    check_torchscript,
)
from timm_deconv import Deconv2d, DeconvLinear

Check = Callable[[Subject], None]

QUICK: dict[str, Any] = {"deconv": {"preset": "paper", "block": 16}}
CIFAR = [name for name in timm_deconv.list_models() if name.endswith("_cifar_deconv")]
DENSE = ["deeplabv3_resnet50_deconv", "deeplabv3_resnet101_deconv", "fcn_resnet50_deconv"]
SHALLOW: dict[str, Any] = {"layers": (1, 1, 1, 1)}
NARROW: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
SHALLOW_CIFAR: dict[str, dict[str, Any]] = {
    "densenet121_cifar_deconv": SHALLOW,
    "dpn92_cifar_deconv": SHALLOW,
    "efficientnet_b0_cifar_deconv": {
        "groups": ((1, 16, 1, 2), (6, 24, 1, 1), (6, 40, 1, 2), (6, 80, 1, 2), (6, 192, 1, 2), (6, 320, 1, 2))
    },
    "mobilenetv2_cifar_deconv": {"groups": ((1, 16, 1, 1), (6, 32, 1, 2), (6, 64, 1, 2), (6, 160, 1, 2))},
    "pnasnet_a_cifar_deconv": {"cells": 1},
    "preact_resnet18_cifar_deconv": SHALLOW,
    "resnet18_cifar_deconv": SHALLOW,
    "resnext29_32x4d_cifar_deconv": {"layers": (1, 1, 1)},
    "senet18_cifar_deconv": SHALLOW,
    "vgg11_cifar_deconv": {},
}
"""The ten 32x32 families, with a block a stage."""

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

HUGE = ("vgg", "legacy_senet154", "pnasnet5large", "resnext101", "dpn98", "densenet161", "densenet201")
OTHERS = [name for name in timm_deconv.list_models() if name not in (*CIFAR, *DENSE, *SMALL)]
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


@pytest.mark.parametrize(("name", "check"), pairs(list(SHALLOW_CIFAR), CHECKS))
def test_timm_contract_at_32x32(name: str, check: Check) -> None:
    check(subject(name, {"width": 0.25, **SHALLOW_CIFAR[name], **QUICK}))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), pairs(CIFAR, CHECKS))
def test_timm_contract_at_32x32_with_default_settings(name: str, check: Check) -> None:
    check(subject(name, {"width": 0.25}))


@pytest.mark.parametrize(("name", "check"), pairs(list(SMALL), CHECKS))
def test_timm_contract_at_imagenet_scale(name: str, check: Check) -> None:
    check(subject(name, {**SMALL[name], **QUICK}, 64))


@pytest.mark.parametrize(("name", "check"), pairs(["fcn_resnet50_deconv"], DENSE_CHECKS))
def test_timm_contract_of_dense_networks(name: str, check: Check) -> None:
    check(subject(name, {**SHALLOW, **QUICK}, 33))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), pairs(DENSE[:2], DENSE_CHECKS))
def test_timm_contract_of_deeplab(name: str, check: Check) -> None:
    check(subject(name, {**SHALLOW, **QUICK}, 33))


FULL: dict[str, Any] = {"deconv": "fast"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "check"),
    [
        *pairs([name for name in OTHERS if not name.startswith(HUGE)], CHECKS),
        *pairs([name for name in OTHERS if name.startswith(HUGE)], (check_forward,)),
    ],
)
def test_timm_contract_of_large_networks(name: str, check: Check) -> None:
    check(subject(name, FULL, 64))


def test_no_name_is_left_out() -> None:
    assert sorted([*CIFAR, *DENSE, *SMALL, *OTHERS]) == timm_deconv.list_models()
    assert set(timm_deconv.list_models()) <= set(timm.list_models("*_deconv"))
    assert len(timm_deconv.list_models()) == 51


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
