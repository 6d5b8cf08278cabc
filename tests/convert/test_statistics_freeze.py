"""freeze and unfreeze: parameters and statistics stop together, in networks and parts of them, of norms too."""

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_deconv import convert_deconv_model, freeze, unfreeze
from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv, Deconv2d
from timm_deconv.layers.module import WhiteningMixin

PRESETS = ("paper", "fast")


def trained_a_little(preset: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar_deconv", width=0.25, deconv=preset).train()
    for _ in range(3):
        model(images())
    return model


def images() -> Tensor:
    return torch.randn(8, 3, 32, 32).cumsum(-1) / 4


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_frozen_network_evaluates_alike_in_training_mode_and_learns_no_statistics(preset: str) -> None:
    model = trained_a_little(preset)
    freeze(model)
    before, x = statistics(model), images()
    output = model(x)
    assert not moved(model, before)
    torch.testing.assert_close(output, model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_freezing_a_part_stops_its_statistics_alone_and_lets_gradients_through(preset: str) -> None:
    model = trained_a_little(preset)
    frozen = "layer1"
    freeze(model, frozen)
    before = statistics(model)
    model(images()).square().mean().backward()
    whiteners = {name for name, layer in model.named_modules() if isinstance(layer, WhiteningMixin)}
    expected = {f"{name}.running_deconv" for name in whiteners if not name.startswith(f"{frozen}.")}
    assert len(expected) < len(whiteners)
    assert {name for name in moved(model, before) if name.endswith("running_deconv")} == expected
    for name, parameter in model.named_parameters():
        inside = name.startswith(f"{frozen}.")
        assert (parameter.grad is None) == inside, name
        assert inside or parameter.grad.isfinite().all(), name


def test_unfrozen_statistics_go_on_from_where_they_were() -> None:
    model = trained_a_little("fast")
    layer = next(m for m in model.modules() if isinstance(m, Deconv2d))
    forwards = int(layer.num_batches_tracked)
    freeze(model)
    model(images())
    assert int(layer.num_batches_tracked) == forwards
    unfreeze(model)
    before = statistics(model)
    model(images())
    assert int(layer.num_batches_tracked) == forwards + 1
    assert moved(model, before) == set(before)


def test_a_frozen_layer_gives_the_gradient_of_its_plain_form() -> None:
    layer = Deconv2d(3, 8, 3, padding=1)
    for _ in range(3):
        layer(images())
    freeze(layer)
    x = images().requires_grad_()
    y = x.detach().clone().requires_grad_()
    weight = torch.randn(8, 8, 32, 32)
    (layer(x) * weight).sum().backward()
    (layer.fuse()(y) * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_layer_with_a_bias_to_learn_goes_on_whitening() -> None:
    layer = Deconv2d(3, 8, 3)
    layer.weight.requires_grad_(False)
    before = statistics(layer)
    layer(images())
    assert "running_deconv" in moved(layer, before)


def test_channel_whitening_is_frozen_too() -> None:
    layer = ChannelDeconv(64)
    freeze(layer)
    before = statistics(layer)
    layer(torch.randn(32, 64, 4, 4))
    assert not moved(layer, before)
    unfreeze(layer)
    layer(torch.randn(32, 64, 4, 4))
    assert moved(layer, before)


def test_batch_norms_that_stayed_are_frozen_as_timm_does_it() -> None:
    network = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.BatchNorm2d(4), Deconv2d(4, 4, 3))
    expected = nn.Sequential(*network)
    timm.utils.freeze(expected)
    freeze(network)
    assert repr(network[:3]) == repr(expected[:3]) and network[3].statistics_frozen
    unfreeze(network)
    assert type(network[2]) is nn.BatchNorm2d and not network[3].statistics_frozen
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_statistics_stay_live_where_only_parameters_are_to_be_frozen() -> None:
    model = trained_a_little("fast")
    freeze(model, include_bn_running_stats=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = statistics(model)
    with pytest.warns(UserWarning, match="timm_deconv.freeze"):
        model(images())
    assert moved(model, before) == set(before)


def test_timms_own_freeze_is_answered_with_ours_once() -> None:
    model = timm.create_model("resnet18_cifar", width=0.25)
    convert_deconv_model(model)
    timm.utils.freeze(model)
    with pytest.warns(UserWarning, match=r"timm_deconv.freeze\(model\)") as said:
        model.train()(images())
        model(images())
    assert len(said) == 1


def test_a_misspelt_module_is_named_and_nothing_is_frozen() -> None:
    model = trained_a_little("fast")
    with pytest.raises(InputError, match="no module 'layer11'; nearest: layer1"):
        freeze(model, ["layer2", "layer11"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(getattr(module, "statistics_frozen", False) for module in model.modules())
