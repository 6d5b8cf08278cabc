"""The preset 'fast' on every registered network: the published layers but squeeze-excite, and only its own settings."""

import json
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_deconv
from tests.models.test_deconv_contract import MANY_LAYERS
from timm_deconv import ChannelDeconv, convert_deconv_model
from timm_deconv.convert import DeconvPolicy, resolve_policy
from timm_deconv.convert.roles import classifier_names, find_roles, linear_layers_as_convs
from timm_deconv.errors import InputError
from timm_deconv.layers import PRESETS, DeconvCfg, WhiteningMixin, preset
from timm_deconv.layers.presets import LINEAR_AS_CONV, PRESET_VERSION

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


def fast(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, deconv="fast")


def whitened(model: nn.Module) -> dict[str, WhiteningMixin]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WhiteningMixin)}


def expected_cfg(role: str, linear_as_conv: bool) -> DeconvCfg | None:
    """The preset, then what makes a convolution a linear layer, then the preset's own role; no family's settings."""
    general = FAST.override(LINEAR_AS_CONV if linear_as_conv else {})
    options = PRESETS["fast"].roles.get(role, {})
    return None if options is None else general.override(options)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_the_settings_of_its_layers_roles_and_saves_the_presets_name_alone(name: str) -> None:
    model = fast(name)
    check_settings(model)
    check_saved_configuration(model)


def check_settings(model: Any) -> None:
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


def check_saved_configuration(model: Any) -> None:
    assert (
        model.requested_policy.to_dict() == model._model_args["deconv"] == {"version": PRESET_VERSION, "preset": "fast"}
    )
    beneath = model.deconv_policy.beneath
    assert model.deconv_policy.preset == "fast" and beneath is not None and beneath.roles == PRESETS["fast"].roles
    assert not (model.deconv_policy.patterns or beneath.patterns or model.deconv_policy.roles or beneath.options)
    written = json.loads(json.dumps(model._model_args["deconv"]))
    assert resolve_policy(written) == model.requested_policy == DeconvPolicy(preset="fast")


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_the_same_layers_but_squeeze_excite_are_whitened_as_with_the_published_settings(name: str) -> None:
    with torch.device("meta"):
        published = timm.create_model(name, deconv="paper")
    excites = {n for n, role in find_roles(published).items() if role == "squeeze_excite"}
    model = fast(name)
    ours, theirs = whitened(model), {n: m for n, m in whitened(published).items() if n not in excites}
    assert {n: type(layer) for n, layer in ours.items()} == {n: type(layer) for n, layer in theirs.items()}
    assert all(ours[n].weight.shape == layer.weight.shape for n, layer in theirs.items())
    assert all(ours[n].cfg != layer.cfg for n, layer in theirs.items())
    assert {n for n, _ in published.named_modules()} == {n for n, _ in model.named_modules()}


def cifar_resnet(deconv: Any, name: str = "resnet18_cifar_deconv") -> Any:
    with torch.device("meta"):
        return timm.create_model(name, deconv=deconv)


def test_what_the_user_asks_for_wins_over_the_preset() -> None:
    deconv = {"preset": "fast", "block": 16, "roles": {"stem": {"n_iter": 4}}, "patterns": {"layer1.0.conv1": None}}
    model = cifar_resnet(deconv)
    assert (model.conv1.cfg.n_iter, model.conv1.cfg.layout, model.conv1.cfg.block) == (4, "window", 16)
    assert type(model.layer1[0].conv1) is nn.Conv2d
    assert model.layer1[0].conv2.cfg == FAST.override({"block": 16, "n_iter": 1})
    assert model.layer2[0].conv1.cfg == FAST.override({"block": 16})
    assert {layer.blocks.features for layer in whitened(model.layer2).values()} == {16}
    assert model.get_classifier().cfg == FAST.override({"block": 16, "wide_block": 0, "min_rows": 0.0})
    assert model.requested_policy.to_dict() == {"version": PRESET_VERSION, **deconv}


@pytest.mark.parametrize("name", ["resnet18_cifar_deconv", "mobilenetv2_cifar_deconv", "resnext29_32x4d_cifar_deconv"])
@pytest.mark.parametrize("preset", ["fast", "paper"])
@pytest.mark.parametrize(("option", "value"), [("n_iter", 5), ("n_iter", 4), ("block", 16), ("eps", 0.1)])
def test_an_option_of_the_user_holds_in_every_layer(name: str, preset: str, option: str, value: Any) -> None:
    layers = whitened(cifar_resnet({"preset": preset, option: value}, name))
    assert {getattr(layer.cfg, option) for layer in layers.values()} == {value}
    assert not any(layer.cfg.quartic for layer in layers.values() if layer.cfg.n_iter > 3)


def test_an_option_of_the_user_leaves_the_rest_of_a_role_alone() -> None:
    model = cifar_resnet({"preset": "paper", "n_iter": 5}, "vgg11_cifar_deconv")
    stem = next(iter(whitened(model).values())).cfg
    assert (stem.n_iter, stem.freeze) == (5, True)
    model = cifar_resnet({"preset": "paper", "freeze": False}, "vgg11_cifar_deconv")
    stem = next(iter(whitened(model).values())).cfg
    assert (stem.n_iter, stem.freeze) == (15, False)
    stem = cifar_resnet({"n_iter": 5}).conv1.cfg
    assert (stem.n_iter, stem.layout, stem.sampling_stride) == (5, "window", 3)


def test_options_leave_squeeze_excite_plain_and_its_role_or_a_pattern_whitens_it() -> None:
    name = "senet18_cifar_deconv"
    excites = {n for n, role in find_roles(fast(name)).items() if role == "squeeze_excite"}
    assert excites and not excites & set(whitened(cifar_resnet({"n_iter": 5}, name)))
    for more in ({"roles": {"squeeze_excite": {"eps": 0.1}}}, {"patterns": {key: {"eps": 0.1} for key in excites}}):
        layers = whitened(cifar_resnet({"n_iter": 5, **more}, name))
        assert {layers[n].cfg for n in excites} == {FAST.override({"n_iter": 5, "eps": 0.1})}


def test_options_of_layout_and_sampling_leave_linear_layers_held_as_convolutions_alone() -> None:
    deconv = {"layout": "window", "sampling_stride": 4, "n_iter": 5}
    layer = cifar_resnet(deconv, "dpn68_deconv").get_classifier()
    assert isinstance(layer, nn.Conv2d)
    assert (layer.cfg.layout, layer.cfg.sampling_stride, layer.cfg.n_iter) == ("flat", 1, 5)
    more = {**deconv, "roles": {"classifier": {"layout": "window"}}, "patterns": {"classifier": {"sampling_stride": 2}}}
    layer = cifar_resnet(more, "dpn68_deconv").get_classifier()
    assert (layer.cfg.layout, layer.cfg.sampling_stride) == ("window", 2)


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
