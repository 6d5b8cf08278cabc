"""What the user did to a network before he converts or fuses it is kept, or said."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.convert.networks import Tiny, images, trained
from timm_deconv import Deconv2d, convert_deconv_model, fuse, transfer
from timm_deconv.errors import InputError

CONVERSIONS = [convert_deconv_model, transfer]


def watched(model: nn.Module, name: str) -> tuple[list[str], list[Any]]:
    """Calls of the hooks of a module, and their handles."""
    calls: list[str] = []
    module = model.get_submodule(name)
    handles = [
        module.register_forward_pre_hook(lambda m, x: calls.append("before")),
        module.register_forward_hook(lambda m, x, y: calls.append("after")),
        module.register_forward_hook(lambda m, x, k, y: calls.append(f"with {sorted(k)}"), with_kwargs=True),
        module.register_full_backward_hook(lambda m, x, y: calls.append("backward")),
    ]
    return calls, handles


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("name", ["stem", "head", "bn1", "bn2"])
def test_hooks_of_layers_and_norms_go_on_being_called_until_their_handles_remove_them(convert: Any, name: str) -> None:
    model = Tiny().eval()
    calls, handles = watched(model, name)
    convert(model, **({"keep_affine": True} if convert is transfer else {}))
    assert not calls
    model(images().requires_grad_()).sum().backward()
    assert calls == ["before", "after", "with []", "backward"]
    for handle in handles:
        handle.remove()
    model(images().requires_grad_()).sum().backward()
    assert len(calls) == 4


def test_hooks_are_called_in_the_fused_copy_too() -> None:
    model = Tiny()
    convert_deconv_model(model)
    calls, _ = watched(model, "stem")
    fuse(model)(images())
    assert calls == ["before", "after", "with []"]


def test_a_hook_that_changes_an_output_still_does() -> None:
    model = Tiny()
    model.stem.register_forward_hook(lambda m, x, y: torch.zeros_like(y))
    convert_deconv_model(model)
    assert not model.stem(images()).any()


def test_what_was_noted_on_a_layer_stays_on_it() -> None:
    model = Tiny()
    model.stem.rate = 0.5
    model.stem.weight.scale = 2
    convert_deconv_model(model)
    assert isinstance(model.stem, Deconv2d) and model.stem.rate == 0.5 and model.stem.weight.scale == 2


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_parameters_without_gradients_have_none_after_conversion_and_fusing(convert: Any) -> None:
    model = Tiny().eval()
    model.stem.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    convert(model, **({"keep_affine": True} if convert is transfer else {}))
    for network in (model, fuse(model)):
        flags = {name: p.requires_grad for name, p in network.named_parameters()}
        assert not flags["stem.weight"] and not flags["stem.bias"] and not flags["head.bias"]
        assert flags["head.weight"] and flags["pointwise.weight"] and flags["pointwise.bias"]


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_the_memory_format_is_kept_by_conversion_and_fusing(convert: Any) -> None:
    model = Tiny().eval().to(memory_format=torch.channels_last)
    convert(model, **({"keep_affine": True} if convert is transfer else {}))
    for network in (model, fuse(model)):
        assert network.stem.weight.is_contiguous(memory_format=torch.channels_last)
        assert not network.stem.weight.is_contiguous()


def parametrised(layer: nn.Module) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(layer, "weight", Double())


def replaced(layer: nn.Module) -> None:
    layer.forward = lambda x: nn.Conv2d.forward(layer, x)  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "the weight of this Conv2d is computed by a hook"),
        (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "the bias of this Conv2d is computed by a hook"),
        (parametrised, "ParametrizedConv2d has no whitening form"),
        (parametrizations.weight_norm, "ParametrizedConv2d has no whitening form"),
        (lambda layer: layer.register_buffer("codes", torch.ones(1)), "this Conv2d holds codes beside weight and bias"),
        (lambda layer: layer.add_module("inner", nn.ReLU()), "this Conv2d holds inner beside weight and bias"),
        (replaced, "the forward of this Conv2d was replaced"),
    ],
)
def test_layers_that_are_more_than_weight_and_bias_stay_plain_with_their_reason(change: Any, reason: str) -> None:
    model = Tiny()
    change(model.pointwise)
    layer, keys = model.pointwise, set(model.pointwise.state_dict())
    report = convert_deconv_model(model)
    assert dict(report.skipped)["pointwise"] == reason
    assert model.pointwise is layer and set(layer.state_dict()) == keys
    model(images())


def test_the_trace_calls_no_hook_of_the_user_and_changes_nothing() -> None:
    model = Tiny()
    calls, _ = watched(model, "stem")
    model.register_forward_hook(lambda m, x, y: calls.append("network"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convert_deconv_model(copy.deepcopy(model), example_inputs=(images(),))
    assert not calls and all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_pruned_whitening_layers_are_refused_by_fuse_and_fused_once_they_are_permanent() -> None:
    model = Tiny()
    convert_deconv_model(model)
    prune.l1_unstructured(model.pointwise, "weight", 0.5)
    trained(model, images())
    with pytest.raises(
        InputError, match=r"weight of pointwise is computed by a hook: .*prune\.remove\(layer, 'weight'"
    ):
        fuse(model)
    prune.remove(model.pointwise, "weight")
    x = images()
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_parametrised_whitening_layers_are_fused_with_what_they_compute() -> None:
    model = Tiny()
    convert_deconv_model(model)
    parametrised(model.pointwise)
    x = images()
    trained(model, x)
    plain = fuse(model)
    assert type(plain.pointwise) is nn.Conv2d
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
