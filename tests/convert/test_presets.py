"""The preset 'fast' on every registered network: the published layers but squeeze-excite, and only its own settings."""

import json
from functools import lru_cache

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_deconv
from tests.models.test_deconv_contract import MANY_LAYERS
from timm_deconv import ChannelDeconv, convert_deconv_model
from timm_deconv.convert import DeconvPolicy, resolve_policy
from timm_deconv.convert.policy import LINEAR_AS_CONV, PRESET_ROLES
from timm_deconv.convert.roles import classifier_names, find_roles, linear_layers_as_convs
from timm_deconv.errors import InputError
from timm_deconv.layers import DeconvCfg, WhiteningMixin, preset

FAST = preset("fast")
NETWORKS = [
    pytest.param(name, marks=pytest.mark.slow if name.startswith(MANY_LAYERS) else ())
    for name in timm_deconv.list_models()
]
OF_EACH_FAMILY = [
    *("densenet121_cifar_deconv", "dpn68_deconv", "efficientnet_b0_cifar_deconv", "fcn_resnet50_deconv"),
    *("mobilenetv2_cifar_deconv", "pnasnet_a_cifar_deconv", "preact_resnet18_cifar_deconv", "resnet18_deconv"),
    *("resnext29_32x4d_cifar_deconv", "senet18_cifar_deconv", "vgg11_deconv", "vgg11_cifar_deconv"),
]


@lru_cache(maxsize=1)  # the tests of one network follow one another
def fast(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, deconv="fast")


def whitened(model: nn.Module) -> dict[str, WhiteningMixin]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WhiteningMixin)}


def expected_cfg(role: str, linear_as_conv: bool) -> DeconvCfg | None:
    """The preset, then what makes a convolution a linear layer, then the preset's own role; no family's settings."""
    general = FAST.override(LINEAR_AS_CONV if linear_as_conv else {})
    options = PRESET_ROLES["fast"].get(role, {})
    return None if options is None else general.override(options)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_whitened_with_the_settings_of_its_layers_roles_alone(name: str) -> None:
    model = fast(name)
    assert not any(isinstance(module, _BatchNorm | ChannelDeconv) for module in model.modules())
    layers = whitened(model)
    roles, as_convs = find_roles(model), linear_layers_as_convs(model)
    assert set(roles) == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(layers) == {n for n, role in roles.items() if role != "squeeze_excite"}
    for layer_name, layer in layers.items():
        assert layer.cfg == expected_cfg(roles[layer_name], layer_name in as_convs), layer_name
        assert not layer.cfg.freeze and layer.cfg.start_corrected
    stems = [layers[n].cfg for n, role in roles.items() if role == "stem"]
    assert len(stems) == 1 and (stems[0].layout, stems[0].n_iter) == ("window", 3)
    classifiers = [layers[n] for n in classifier_names(model)]
    assert classifiers and all((layer.cfg.block, layer.cfg.min_rows) == (512, 0.0) for layer in classifiers)
    assert [n for n, role in roles.items() if role == "classifier"] == list(classifier_names(model))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_configuration_names_the_preset_and_nothing_of_its_roles(name: str) -> None:
    model = fast(name)
    assert model.requested_policy.to_dict() == model._model_args["deconv"] == {"preset": "fast"}
    assert model.deconv_policy.preset == "fast" and model.deconv_policy.roles == PRESET_ROLES["fast"]
    assert not model.deconv_policy.patterns
    written = json.loads(json.dumps(model._model_args["deconv"]))
    assert resolve_policy(written) == model.requested_policy == DeconvPolicy(preset="fast")


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_the_same_layers_but_squeeze_excite_are_whitened_as_with_the_published_settings(name: str) -> None:
    with torch.device("meta"):
        published = timm.create_model(name, deconv="paper")
    excites = {n for n, role in find_roles(published).items() if role == "squeeze_excite"}
    ours, theirs = whitened(fast(name)), {n: m for n, m in whitened(published).items() if n not in excites}
    assert {n: type(layer) for n, layer in ours.items()} == {n: type(layer) for n, layer in theirs.items()}
    assert all(ours[n].weight.shape == layer.weight.shape for n, layer in theirs.items())
    assert all(ours[n].cfg != layer.cfg for n, layer in theirs.items())
    assert {n for n, _ in published.named_modules()} == {n for n, _ in fast(name).named_modules()}


def test_what_the_user_asks_for_wins_over_the_preset() -> None:
    deconv = {"preset": "fast", "block": 16, "roles": {"stem": {"n_iter": 4}}, "patterns": {"layer1.0.conv1": None}}
    with torch.device("meta"):
        model = timm.create_model("resnet18_cifar_deconv", deconv=deconv)
    assert (model.conv1.cfg.n_iter, model.conv1.cfg.layout, model.conv1.cfg.block) == (4, "window", 16)
    assert type(model.layer1[0].conv1) is nn.Conv2d
    assert model.layer1[0].conv2.cfg == FAST.override({"block": 16, "n_iter": 1})
    assert model.layer2[0].conv1.cfg == FAST.override({"block": 16})
    assert {layer.partition.features for layer in whitened(model.layer2).values()} == {16}
    assert model.get_classifier().cfg.block == 512  # of the role, which is more particular
    assert model.requested_policy.to_dict() == deconv


@pytest.mark.parametrize(
    ("deconv", "message"),
    [
        ("fats", "no preset 'fats'; nearest: fast"),
        ({"preset": "fasst"}, "no preset 'fasst'; nearest: fast"),
        ("quick", "no preset 'quick'; there are: fast, paper"),
        ({"preset": "fast", "max_row": 5}, "no whitening option 'max_row'; nearest: .*max_rows"),
        ({"preset": "fast", "max_rows": -1}, "max_rows=-1: must be a whole number"),
    ],
)
def test_unknown_presets_and_options_come_with_the_nearest(deconv: object, message: str) -> None:
    with torch.device("meta"), pytest.raises(InputError, match=message) as caught:
        timm.create_model("resnet18_cifar_deconv", deconv=deconv)
    assert "\n" not in str(caught.value)


def test_any_timm_network_trains_a_step_with_finite_gradients() -> None:
    model = timm.create_model("regnety_002", num_classes=5)
    report = convert_deconv_model(model, "fast")
    assert not report.norms_left and {"depthwise", "grouped"} & {layer.role for layer in report.converted}
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    output = model(torch.randn(4, 3, 48, 48))
    nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 3])).backward()
    assert output.isfinite().all() and output.abs().max() < 100
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimiser.step()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)
    for name, layer in whitened(model).items():
        assert layer.num_batches_tracked == 1 and not layer.saw_nonfinite, name
        assert layer.running_deconv.isfinite().all(), name
