"""Weights of batch-norm networks by the deconvolution networks' names: tags, the checkpoint filter, a local Hub."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint, save_for_hf
from torch import Tensor, nn

import timm_deconv
from tests.hub_server import hub
from tests.models.batch_norm_networks import NARROW, difference, randomised
from timm_deconv.errors import InputError
from timm_deconv.layers.notices import UNCALIBRATED
from timm_deconv.models.pretrained import create_transferred
from timm_deconv.models.zoo import entries

PRE_NORM = ("densenet", "dpn", "preact_resnet", "resnetv2")


def load(name: str, weights: dict[str, Tensor], **options: Any) -> nn.Module:
    overlay = {"state_dict": dict(weights), **options.pop("overlay", {})}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


@pytest.fixture(scope="module")
def batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return randomised("resnet18", **NARROW)


@pytest.fixture(scope="module")
def weights(batch_norm: nn.Module) -> dict[str, Tensor]:
    return batch_norm.state_dict()


def sources() -> dict[str, str]:
    """Deconvolution name -> batch-norm name, of the ImageNet networks."""
    found = {}
    for name in timm_deconv.list_models():
        base = name.removesuffix("_deconv")
        source = next((n for n in (f"{base}_bn", base) if timm.is_model(n)), base)
        if not model_entrypoint(source).__module__.startswith("timm_deconv."):
            found[name] = source
    return found


@pytest.mark.parametrize(("name", "source"), sources().items())
def test_post_norm_names_have_the_sources_tags_and_pre_norm_names_say_why_not(name: str, source: str) -> None:
    tagged = {cfg.tag: cfg for key, cfg in get_arch_pretrained_cfgs(name).items() if key not in entries()}
    if source.startswith(PRE_NORM):
        assert set(tagged) == {None}
        assert "norms stand before the convolutions" in " ".join(model_entrypoint(name).__doc__.split())
        assert not timm.list_pretrained(f"{name}*")
        return
    theirs = {f"bn_{cfg.tag}": cfg for cfg in get_arch_pretrained_cfgs(source).values() if cfg.has_weights}
    assert tagged.keys() == theirs.keys()
    assert next(iter(tagged)) == f"bn_{get_pretrained_cfg(source).tag}"
    for tag, cfg in theirs.items():
        ours = tagged[tag].to_dict()
        assert ours.pop("architecture") == name and ours.pop("tag") == tag
        passed_on = cfg.to_dict()
        del passed_on["architecture"], passed_on["tag"]
        assert ours == passed_on  # place, licence, origin, mean, std, classes, sizes
        assert ours.get("hf_hub_id") or ours.get("url")


@torch.no_grad()
def test_batch_norm_weights_give_the_same_function_under_any_option(
    batch_norm: nn.Module, weights: dict[str, Tensor]
) -> None:
    x = torch.randn(2, 3, 64, 64)
    expected = batch_norm(x)
    plain = {"patterns": {"layer1.*": None}, "classifier": "plain"}
    for options in ({}, {"deconv": {"block": 32, "layout": "window"}}, {"deconv": plain}, {"fused": True}):
        assert difference(load("resnet18_deconv", weights, **options, **NARROW)(x), expected) < 1e-4
    assert difference(load("deconv", weights, base="resnet18", **NARROW)(x), expected) < 1e-4


@torch.no_grad()
def test_other_channels_classes_and_features_are_as_the_batch_norm_network_has_them(weights: dict[str, Tensor]) -> None:
    grey, x = torch.randn(2, 1, 64, 64), torch.randn(2, 3, 64, 64)
    ours = load("resnet18_deconv", weights, in_chans=1, num_classes=5, **NARROW)
    theirs = load("resnet18", weights, in_chans=1, num_classes=5, **NARROW)
    assert difference(ours.forward_features(grey), theirs.forward_features(grey)) < 1e-4
    assert ours(grey).shape == (2, 5)
    options: dict[str, Any]
    for options in ({"num_classes": 0}, {"num_classes": 0, "global_pool": ""}):
        headless = [load(name, weights, **options, **NARROW)(x) for name in ("resnet18_deconv", "resnet18")]
        assert difference(*headless) < 1e-4
    maps = [load(name, weights, features_only=True, **NARROW)(x) for name in ("resnet18_deconv", "resnet18")]
    assert all(difference(a, b) < 1e-4 for a, b in zip(*maps, strict=True))


@torch.no_grad()
def test_weights_of_a_dense_network_with_another_head() -> None:
    layers = (1, 1, 1, 1)
    trained = randomised("fcn_resnet50", layers=layers, aux_head=True)
    x = torch.randn(1, 3, 33, 33)
    for options in ({}, {"aux_head": True}):
        model = load("fcn_resnet50_deconv", trained.state_dict(), layers=layers, **options)
        assert difference(model(x), trained(x)) < 1e-4
    own = load("fcn_resnet50_deconv", model.state_dict(), layers=layers)
    assert torch.equal(own(x), model(x))
    bare = {key: value for key, value in trained.state_dict().items() if not key.startswith("aux_")}
    model = load("fcn_resnet50_deconv", bare, layers=layers, aux_head=True, num_classes=3)
    assert difference(model.forward_features(x), trained.forward_features(x)) < 1e-4


@torch.no_grad()
def test_deconvolution_weights_are_left_alone(weights: dict[str, Tensor]) -> None:
    trained = load("resnet18_deconv", weights, **NARROW)
    for tensor in trained.state_dict().values():  # as training leaves it
        tensor.copy_(tensor + torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 7)
    back = load("resnet18_deconv", trained.state_dict(), **NARROW)
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in back.state_dict().items())
    plain = load("resnet18_deconv", weights, deconv={"classifier": "plain"}, **NARROW).state_dict()
    back = load("resnet18_deconv", plain, deconv={"classifier": "plain"}, **NARROW)
    assert all(torch.equal(value, plain[key]) for key, value in back.state_dict().items())


def without(weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if k != key}


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}])
def test_weights_that_do_not_fit_are_refused_in_one_line(weights: dict[str, Tensor], options: dict[str, Any]) -> None:
    own = timm.create_model("resnet18_deconv", **NARROW).state_dict()
    fused = timm_deconv.fuse(timm.create_model("resnet18_deconv", **NARROW)).state_dict()
    wrong_shape = {**own, "layer1.0.conv1.weight": torch.zeros(3, 3, 3, 3)}
    cases: list[tuple[str, dict[str, Tensor], str]] = [
        ("resnet34_deconv", weights, r"batch-norm weights do not fit resnet34: .*layer1\.2\."),
        ("resnet18_deconv", without(weights, "layer1.0.bn1.weight"), r"do not fit resnet18: .*layer1\.0\.bn1\.weight"),
        ("resnet18_deconv", {**weights, "extra": torch.zeros(1)}, r"do not fit resnet18: .*extra"),
        ("resnet34_deconv", own, r"do not fit resnet34_deconv: \d+ missing \(layer1\.2\.conv1\.bias, .*\)"),
        ("resnet18_deconv", without(own, "conv1.bias"), r"do not fit resnet18_deconv: 1 missing \(conv1\.bias\)"),
        ("resnet18_deconv", {**own, "extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
        ("resnet18_deconv", wrong_shape, r"1 of another shape \(layer1\.0\.conv1\.weight\)"),
        ("resnet34_deconv", fused, r"do not fit resnet34_deconv: \d+ missing \(layer1\.2\.conv1\.bias, .*\)"),
        ("resnet18_deconv", without(fused, "conv1.bias"), r"do not fit resnet18_deconv: \d+ missing \(conv1\.bias"),
    ]
    for name, state_dict, message in cases:
        for form in ({}, {"fused": True}):
            with pytest.raises(InputError, match=message) as error:
                load(name, state_dict, **form, **options, **NARROW)
            assert "\n" not in str(error.value)


def test_batch_norm_weights_of_a_pre_norm_network_are_refused_with_the_reason(tmp_path: Path) -> None:
    small = {"growth_rate": 8, "block_config": (2, 2, 2, 2)}
    trained = randomised("densenet121", **small)
    file = str(tmp_path / "densenet.safetensors")
    save_file(trained.state_dict(), file)
    with pytest.raises(InputError, match=r"cannot be folded .* pre-norm .*transfer\(model, keep_affine=True\)"):
        timm.create_model("densenet121_deconv", pretrained=True, pretrained_cfg_overlay={"file": file}, **small)
    x = torch.randn(1, 3, 64, 64)
    kept = load("deconv", trained.state_dict(), base="densenet121", keep_affine=True, **small)
    with torch.no_grad():
        assert difference(kept(x), trained(x)) < 1e-4


def test_create_transferred_takes_any_name_or_checkpoint(tmp_path: Path, batch_norm: nn.Module) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(batch_norm.state_dict(), file)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        registered = create_transferred("resnet18.tv_in1k", file, policy={"block": 32}, **NARROW).eval()
        assert registered.pretrained_cfg["architecture"] == "resnet18_deconv"
        assert registered.pretrained_cfg["tag"] == "bn_tv_in1k"
        assert registered.deconv_policy.options["block"] == 32
        assert difference(registered(x), batch_norm(x)) < 1e-4
        save_for_hf(batch_norm, str(tmp_path / "plain"), safe_serialization=True)
        generic = create_transferred(f"local-dir:{tmp_path / 'plain'}").eval()
        assert generic.pretrained_cfg["architecture"] == "deconv"
        assert difference(generic(x), batch_norm(x)) < 1e-4
    for arguments, message in (
        ({"network": "resnet81"}, "no network 'resnet81'; nearest: "),
        ({"network": "resnet18", "checkpoint": tmp_path / "none.pth"}, "no checkpoint "),
        ({"network": "resnet18", "checkpoint": file, "policy": "{block: 3}"}, "no preset '{block: 3}'"),
        ({"network": "resnet26", "checkpoint": file}, "do not fit resnet26: 40 missing"),
    ):
        with pytest.raises(InputError, match=message) as error:
            create_transferred(**arguments)
        assert "\n" not in str(error.value)


FROM_THE_HUB = """
import json, sys
import timm, torch
import timm_deconv
from safetensors.torch import load_file

narrow = {"channels": (16, 32, 64, 128)}
reference = timm.create_model("resnet18", **narrow).eval()
reference.load_state_dict(load_file(sys.argv[1]))
x = torch.randn(1, 3, 64, 64)
grey = timm.create_model("resnet18", pretrained=True, in_chans=1, num_classes=0, **narrow).eval()
result = {}
cases = {
    "plain": ("resnet18_deconv", {}),
    "tag": ("resnet18_deconv.bn_a1_in1k", {"deconv": {"block": 16}}),
    "grey": ("resnet18_deconv", {"in_chans": 1, "num_classes": 0}),
    "url": ("resnet18_deconv", {"pretrained_cfg_overlay": {"hf_hub_id": None, "url": sys.argv[2]}}),
}
for case, (name, options) in cases.items():
    model = timm.create_model(name, pretrained=True, **options, **narrow).eval()
    with torch.no_grad():
        out, expected = (model(x[:, :1]), grey(x[:, :1])) if case == "grey" else (model(x), reference(x))
    result[case] = float((out - expected).abs().max() / expected.abs().max())
known = load_file(sys.argv[3])
for place in ("converted", "fused"):
    model = timm.create_model(f"hf-hub:someone/{place}", pretrained=True).eval()
    result[place] = float((model(known["x"]) - known["y"]).abs().max() / known["y"].abs().max())
try:
    timm.create_model("resnet18_deconv.bn_tv_in1k", pretrained=True)
except Exception as error:
    result["missing"] = type(error).__name__
print(json.dumps(result))
"""


def test_pretrained_downloads_timms_weights_from_the_hub(tmp_path: Path, batch_norm: nn.Module) -> None:
    repository = tmp_path / "hub" / "timm" / "resnet18.a1_in1k"
    save_for_hf(batch_norm, str(repository), safe_serialization=True)
    torch.save(batch_norm.state_dict(), repository / "weights.pth")
    converted = timm.create_model("test_resnet")
    timm_deconv.convert_deconv_model(converted, {"block": 16})
    x = torch.randn(8, 3, 64, 64)
    converted.train()(x)
    for place, model in (("converted", converted.eval()), ("fused", timm_deconv.fuse(converted))):
        save_for_hf(model, str(tmp_path / "hub" / "someone" / place), safe_serialization=True)
    known = tmp_path / "known.safetensors"
    save_file({"x": x, "y": converted(x).detach()}, known)
    requests: list[str] = []
    with hub(tmp_path / "hub", requests) as endpoint:
        found = subprocess.run(
            [
                sys.executable,
                "-c",
                FROM_THE_HUB,
                str(repository / "model.safetensors"),
                f"{endpoint}/timm/resnet18.a1_in1k/resolve/main/weights.pth",
                str(known),
            ],
            env={
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HOME": str(tmp_path / "cache"),
                "TORCH_HOME": str(tmp_path / "torch"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert result.pop("missing") == "RepositoryNotFoundError"
    assert result.keys() == {"plain", "tag", "grey", "url", "converted", "fused"} and max(result.values()) < 1e-4
    assert "HEAD /timm/resnet18.a1_in1k/resolve/main/model.safetensors" in requests


def test_weights_without_counters_are_no_weights_of_a_fused_network(weights: dict[str, Tensor]) -> None:
    own = timm.create_model("resnet18_deconv", **NARROW).state_dict()
    older = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    model = load("resnet18_deconv", older, **NARROW)
    assert torch.equal(model.conv1.weight, own["conv1.weight"])


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet18_cifar_deconv", "resnet18_deconv", "deconv"])
def test_counts_that_make_no_sense_are_refused(name: str) -> None:
    base = {"base": "resnet18"} if name == "deconv" else {}
    for options, message in (
        ({"num_classes": -3}, "num_classes=-3: it is a whole number, 0 at least"),
        ({"num_classes": 2.5}, r"num_classes=2\.5"),
        ({"in_chans": 0}, "in_chans=0: it is a whole number, 1 at least"),
    ):
        with pytest.raises(InputError, match=message):
            timm.create_model(name, **base, **options)


def said_in_training(model: nn.Module) -> int:
    """How often the first two training forwards speak of weights that were transferred."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model.train()(torch.randn(4, 3, 32, 32))
    return sum(str(warning.message) == UNCALIBRATED for warning in said)


def test_training_of_transferred_weights_is_warned_of_once_until_images_were_seen(tmp_path: Path) -> None:
    source = randomised("resnet18_cifar", width=0.125)
    torch.save(source.state_dict(), tmp_path / "norms.pth")
    file = {"file": str(tmp_path / "norms.pth")}

    def create() -> nn.Module:
        return timm.create_model("resnet18_cifar_deconv", pretrained=True, pretrained_cfg_overlay=file, width=0.125)

    transferred = copy.deepcopy(source)
    timm_deconv.transfer(transferred)
    save_for_hf(create(), str(tmp_path / "uncalibrated"), safe_serialization=True)
    generic = {"base": "resnet18_cifar", "pretrained_cfg_overlay": file}
    for model in (
        transferred,
        create(),
        copy.deepcopy(create()),
        timm.create_model("deconv", pretrained=True, width=0.125, **generic),
        timm.create_model(f"local-dir:{tmp_path / 'uncalibrated'}", pretrained=True),
    ):
        assert said_in_training(model) == 1
    save_for_hf(model, str(tmp_path / "trained"), safe_serialization=True)
    calibrated, resumed = create(), create()
    timm_deconv.calibrate(calibrated, torch.randn(64, 3, 32, 32))
    resumed.load_state_dict(model.state_dict())
    for model in (
        calibrated,
        resumed,
        timm.create_model(f"local-dir:{tmp_path / 'trained'}", pretrained=True),
        timm.create_model("resnet18_cifar_deconv", width=0.125),
    ):
        assert said_in_training(model) == 0


def test_the_docstrings_say_it_where_pretrained_stands() -> None:
    for name in ("resnet18_deconv", "deconv"):
        text = " ".join((model_entrypoint(name).__doc__ or "").split())
        assert (
            "raining" in text and "timm_deconv.calibrate" in text and "python -m timm_deconv --calibrate DATA" in text
        )
