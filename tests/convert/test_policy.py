"""Policies: which layer gets which configuration, and what is refused."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_deconv  # noqa: F401 (registers the networks)
from tests.convert.networks import Tiny
from timm_deconv.convert import DeconvPolicy, convert_deconv_model, resolve_policy
from timm_deconv.errors import InputError
from timm_deconv.layers import DeconvCfg
from timm_deconv.models.registration import IMAGENET_POLICY


def test_the_particular_wins_over_the_general() -> None:
    policy = DeconvPolicy(
        options={"n_iter": 2, "block": 2, "eps": 0.1},
        roles={"stem": {"n_iter": 3, "block": 3}},
        patterns={"conv*": {"n_iter": 4}, "conv1": {"eps": 0.5}},
    )
    stem = policy.cfg("conv1", "stem")
    assert stem is not None and (stem.n_iter, stem.block, stem.eps, stem.momentum) == (4, 3, 0.5, 0.1)
    other = policy.cfg("layer1.conv1", "spatial")
    assert other is not None and (other.n_iter, other.block, other.eps) == (2, 2, 0.1)


def test_none_leaves_plain_and_a_later_pattern_takes_it_back() -> None:
    policy = DeconvPolicy(roles={"spatial": None}, patterns={"a*": {}, "ab": None})
    assert policy.cfg("c", "spatial") is None
    assert policy.cfg("a", "spatial") is not None
    assert policy.cfg("ab", "spatial") is None


def test_a_policy_over_a_familys_own_wins_where_both_speak() -> None:
    stem = {"freeze": True, "n_iter": 15}
    options = {"min_rows": 1.0, "eps": 0.1}
    family = DeconvPolicy(options=options, roles={"stem": stem}, patterns={"a": {}, "b": None})
    own = DeconvPolicy(options={"eps": 0.2}, roles={"stem": {"n_iter": 2}}, patterns={"a": None})
    policy = own.over(family)
    assert dict(policy.options) == {"min_rows": 1.0, "eps": 0.2}
    assert policy.roles["stem"] == {"freeze": True, "n_iter": 2}
    assert list(policy.patterns.items()) == [("b", None), ("a", None)]


@pytest.mark.parametrize(
    "policy",
    [
        DeconvPolicy(),
        DeconvPolicy(options={"block": 16}),
        DeconvPolicy(roles={"stem": None, "linear": {}}, patterns={"layer4.*": {"n_iter": 3}}, classifier="plain"),
    ],
)
def test_a_policy_survives_json(policy: DeconvPolicy) -> None:
    assert resolve_policy(json.loads(json.dumps(policy.to_dict()))) == policy


def test_the_written_form_names_the_preset() -> None:
    assert DeconvPolicy().to_dict()["preset"] == "fast"


def test_deconv_is_a_preset_a_dictionary_or_a_policy() -> None:
    assert resolve_policy(None) == resolve_policy("fast") == resolve_policy({}) == DeconvPolicy()
    policy = DeconvPolicy(options={"block": 16}, classifier="plain")
    assert resolve_policy({"block": 16, "classifier": "plain"}) == policy
    assert resolve_policy(policy) is policy


@pytest.mark.parametrize("deconv", ["paper", {"block": 4}, DeconvPolicy(options={"block": 4})])
def test_registered_names_take_all_three(deconv: object) -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18_cifar_deconv", deconv=deconv)
    assert model.layer1[0].conv1.cfg.block == (64 if deconv == "paper" else 4)


@pytest.mark.parametrize(
    ("deconv", "message"),
    [
        ("papr", r"no preset 'papr'; nearest: paper"),
        (["paper"], r"deconv=\['paper'\]: give a preset's name"),
        ({"preset": 5}, "no preset '5'"),
        ({"blok": 16}, "no whitening option 'blok'; nearest: block"),
        ({"role": {}}, "no whitening option 'role'; nearest: roles"),
        ({"block": 0}, "block=0: must be a positive whole number"),
        ({"eps": -1.0}, "eps=-1.0: must be a positive number"),
        ({"n_iter": 2.5}, "n_iter=2.5: must be"),
        ({"momentum": 0}, r"momentum=0: must be a number in \(0, 1\]"),
        ({"roles": {"stm": {}}}, "no role 'stm'; nearest: stem"),
        ({"roles": 5}, "roles=5: must be a dictionary"),
        ({"roles": {"stem": 5}}, "'stem': 5: must be a dictionary, or None"),
        ({"roles": {"stem": {"blok": 1}}}, "no whitening option 'blok'"),
        ({"patterns": {5: {}}}, "pattern 5: must be a string"),
        ({"patterns": {"stem": {"block": -1}}}, "block=-1"),
        ({"patterns": {"stm": {}}}, "no layer that matches 'stm'; nearest: stem"),
        ({"patterns": {"zzz*": None}}, r"no layer that matches 'zzz\*'; there are: depthwise, grouped, head"),
        ({"classifier": "lin"}, "no classifier 'lin'; nearest: linear"),
        ({"classifier": "channel"}, "no classifier 'channel'; there are: linear, plain"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_changes_nothing(deconv: object, message: str) -> None:
    model = Tiny()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(InputError, match=message) as caught:
        convert_deconv_model(model, deconv)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert type(model) is Tiny and model.act1.inplace


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), "nothing to convert in Sequential: it has no convolution"),
        (nn.Sequential(nn.Conv1d(3, 3, 1)), "nothing to convert .* left plain .*Conv1d has no whitening form"),
        (nn.Conv2d(3, 3, 1), "a Conv2d alone is no network"),
        (nn.DataParallel(nn.Sequential(nn.Conv2d(3, 3, 1))), "DataParallel wraps the network"),
    ],
)
def test_networks_that_cannot_be_converted(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert_deconv_model(model)


def test_a_network_is_converted_once() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18_cifar_deconv")
    with pytest.raises(InputError, match="is a deconvolution network already"):
        convert_deconv_model(model)


def test_a_converted_network_evaluates_soundly_after_one_training_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(12)), nn.Flatten(), nn.Linear(128, 3))
    convert_deconv_model(model)
    x = 100 * torch.randn(64, 8, 4, 4)
    trained = model.train()(x).detach()
    assert model.eval()(x).abs().max() < trained.abs().max()
    for _ in range(20):
        model.train()(100 * torch.randn(64, 8, 4, 4))
    deviations = [model.train(training)(x).detach().std(0).mean() for training in (True, False)]
    assert 0.5 * deviations[0] < deviations[1] < 1.5 * deviations[0]


def test_a_policy_cannot_be_changed_nor_by_the_dictionaries_it_was_made_of() -> None:
    stem, roles = {"n_iter": 3}, {}
    roles["stem"] = stem
    given: dict[str, Any] = {"block": 16, "roles": roles, "patterns": {"a": {"eps": 0.1}}}
    policy: Any = resolve_policy(given)
    written = json.dumps(policy.to_dict())
    stem["n_iter"], roles["linear"], given["block"] = 7, None, 3
    policy.to_dict()["roles"]["stem"]["n_iter"] = 7
    for mapping in (policy.options, policy.roles, policy.roles["stem"], policy.patterns, policy.patterns["a"]):
        with pytest.raises(TypeError):
            mapping["n_iter"] = 7
    with pytest.raises(FrozenInstanceError):
        policy.preset = "paper"
    assert json.dumps(policy.to_dict()) == written
    options = {"block": 4}
    direct = DeconvPolicy(options=options)
    options["block"] = 0
    assert direct.cfg("a", "spatial").block == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_copies_and_pickles_of_a_policy_equal_it_and_cannot_be_changed(again: Any) -> None:
    roles = {"stem": {"n_iter": 3}, "linear": None}
    policy = DeconvPolicy(preset="paper", options={"block": 16}, roles=roles, version=1)
    for each in (policy, policy.over_published(IMAGENET_POLICY)):
        other = again(each)
        assert other == each and other.version == each.version and other.to_dict() == each.to_dict()
        with pytest.raises(TypeError):
            other.roles["stem"]["n_iter"] = 7


def test_a_complete_policy_survives_json_and_gives_another_network_the_same() -> None:
    with torch.device("meta"):
        model = timm.create_model("vgg11_cifar_deconv", deconv={"preset": "paper", "eps": 0.1})
    complete = model.deconv_policy
    again = resolve_policy(json.loads(json.dumps(complete.to_dict())))
    assert again == complete and again.over_published(IMAGENET_POLICY) is again
    assert again.cfg("a", "stem") == DeconvCfg(eps=0.1, n_iter=15, freeze=True)
