"""What a user writes in a policy does something, or he is told in one line; what comes along unasked is no fault."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_deconv  # noqa: F401 (registers the networks)
from timm_deconv import DeconvLinear, convert_deconv_model, transfer
from timm_deconv.errors import InputError
from timm_deconv.layers import WhiteningMixin


def on_meta(name: str, deconv: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, deconv=deconv, **kwargs)


@pytest.mark.parametrize(
    ("deconv", "message"),
    [
        (
            {"preset": "paper", "quartic": True},
            "quartic=True: does nothing in any layer: n_iter is 5; it is for 2 or 3",
        ),
        ({"quartic": True, "n_iter": 5}, "quartic=True: does nothing in any layer: n_iter is 5"),
        (
            {"roles": {"block_end": {"quartic": True}}},
            "quartic=True: does nothing in any layer of the role 'block_end'",
        ),
        ({"wide_block": 512}, "wide_block=512: does nothing in any layer: it is not smaller than block=256"),
        (
            {"preset": "paper", "roles": {"spatial": {"wide_block": 8}}},
            "wide_block=8: does nothing in any layer of the role 'spatial': layout is 'interleaved'",
        ),
        ({"freeze_iter": 50}, "freeze_iter=50: does nothing in any layer: freeze is False"),
        ({"patterns": {"fc": {"layout": "window"}}}, "layout='window': does nothing in any layer that matches 'fc'"),
        ({"roles": {"classifier": {"max_rows": 9}}}, "max_rows=9: does nothing in any layer of the role 'classifier'"),
    ],
)
def test_an_option_without_effect_is_refused_and_nothing_has_changed(deconv: Any, message: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18_cifar")
    with pytest.raises(InputError, match=message) as caught:
        convert_deconv_model(model, deconv)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, WhiteningMixin) for module in model.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with pytest.raises(InputError, match=message):
        on_meta("resnet18_cifar_deconv", deconv)


@pytest.mark.parametrize(
    "deconv",
    [
        {"n_iter": 5},
        {"block": 16},
        {"quartic": False, "n_iter": 7},
        {"preset": "paper", "quartic": True, "roles": {"spatial": {"n_iter": 3}}},
        {"preset": "paper", "wide_block": 64},
        {"preset": "paper", "layout": "flat", "wide_block": 8},
        {"freeze_iter": 50, "roles": {"stem": {"freeze": True}}},
        {"layout": "window", "wide_block": 0, "quartic": False},
    ],
)
def test_an_option_that_does_something_in_some_layer_is_taken(deconv: Any) -> None:
    on_meta("resnet18_cifar_deconv", deconv)


def test_a_role_that_no_layer_has_is_said() -> None:
    with pytest.warns(UserWarning, match="roles: no layer of this CifarResNet is 'depthwise'; there are: block_end, "):
        on_meta("resnet18_cifar_deconv", {"roles": {"depthwise": {"eps": 0.1}}})
    with pytest.warns(UserWarning, match="classifier='plain': no classifier was found in this Sequential"):
        convert_deconv_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), {"classifier": "plain"})
    on_meta("resnet18_cifar_deconv", {"roles": {"classifier": {"eps": 0.1}}, "classifier": "plain"}, num_classes=0)


def test_what_lies_beneath_is_not_judged_nor_a_policy_that_was_complete() -> None:
    model: Any = on_meta("senet18_cifar_deconv", {"preset": "paper", "roles": {"squeeze_excite": {"eps": 0.1}}})
    with torch.device("meta"):
        other = timm.create_model("resnet18_cifar")
    transfer(other, model.deconv_policy)
    assert other.deconv_policy == model.deconv_policy


def test_a_pattern_with_fields_whitens_hidden_linear_layers_of_transformers() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_vit", num_classes=5)
    convert_deconv_model(model, {"patterns": {"blocks.0.mlp.fc1": {"eps": 0.1}, "blocks.1.*": None}})
    whitened = {name for name, module in model.named_modules() if isinstance(module, DeconvLinear)}
    assert whitened == {"blocks.0.mlp.fc1", "head"}
