"""The deconvolution forms against the published ones: every whitened layer's settings, sizes, MACs and stage shapes.

Deliberate differences: the published EfficientNet keeps batch norm in its blocks and the published ImageNet ResNets in
their downsample branches; ours keep none.
"""

import json
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.golden_files import golden_folder
from tests.models.test_twins import STAGES, geometry, layers, shapes_and_macs
from timm_deconv import Deconv2d, DeconvLinear
from timm_deconv.models.mobilenetv2 import InvertedResidual

ARCHITECTURES = json.loads((golden_folder() / "architectures.json").read_text())
GOLDEN: dict[str, Any] = {
    **{f"{name}_cifar": forms["deconv"] for name, forms in ARCHITECTURES["cifar"].items()},
    **{name: forms["deconv"] for kind in ("imagenet", "segmentation") for name, forms in ARCHITECTURES[kind].items()},
}

PARAMETERS = {
    "efficientnet_b0_cifar": 2_892_193,
    "resnet18": 11_684_712,
    "resnet34": 21_789_160,
    "resnet50": 25_530_472,
    "resnet101": 44_496_488,
    "deeplabv3_resnet50": 39_610_517,
    "deeplabv3_resnet101": 58_576_533,
    "fcn_resnet50": 32_929_941,
    "deeplabv3_resnet50_aux": 41_975_466,
    "deeplabv3_resnet101_aux": 60_941_482,
    "fcn_resnet50_aux": 35_294_890,
}
"""Where ours deviate on purpose: biases in place of the batch norms that the published networks keep."""

TIMM_STAGES = {"relu": "act1", "classifier": "head.fc"}
"""Published stage -> timm's module. timm's VGG has the published `classifier`'s hidden layers in `pre_logits`."""


@cache
def on_meta(name: str) -> nn.Module:
    """The deconvolution form at full width without storage; dense ones with auxiliary head run in training mode."""
    aux = {"aux_head": True} if name.endswith("_aux") else {}
    with torch.device("meta"):
        model = timm.create_model(f"{name.removesuffix('_aux')}_deconv", deconv="paper", **aux)
    return model.train(name.endswith("_aux"))


def settings(layer: Deconv2d | DeconvLinear) -> dict[str, Any]:
    """A layer in the words of the golden file: a convolution that whitens flat runs of features is linear there."""
    cfg, features = layer.cfg, layer.blocks.features
    common = {"n_iter": cfg.n_iter, "eps": cfg.eps, "block": features}
    if isinstance(layer, DeconvLinear):
        return {"kind": "linear", "in_features": layer.in_features, "out_features": layer.out_features, **common}
    chs_in, chs_out, kernel, stride, padding, dilation, groups = geometry(layer)
    if cfg.layout == "flat":
        assert (cfg.sampling_stride, stride, groups, cfg.freeze) == (1, 1, 1, False)
        return {"kind": "linear", "in_features": chs_in * kernel**2, "out_features": chs_out, **common}
    assert layer.blocks.interleaved == (groups == 1 and layer.blocks.number > 1)
    shape = {"in_channels": chs_in, "out_channels": chs_out, "kernel": kernel, "stride": stride, "groups": groups}
    return {
        "kind": "conv",
        **shape,
        "padding": padding,
        "dilation": dilation,
        **common,
        "block": features // kernel**2,
        "features": features,
        "sampling_stride_times_stride": cfg.sampling_stride * stride,
        "freeze": cfg.freeze,
        "freeze_iter": cfg.freeze_iter,
    }


def as_lines(layers: list[dict[str, Any]]) -> list[str]:
    return [json.dumps({k: v for k, v in layer.items() if k != "name"}, sort_keys=True) for layer in layers]


def whitened(name: str) -> list[Any]:
    return layers(on_meta(name), (Deconv2d, DeconvLinear))


@cache
def traced(name: str) -> tuple[dict[str, list[int]], int]:
    return shapes_and_macs(on_meta(name), GOLDEN[name]["input"][-1])


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "efficientnet_b0_cifar"])
def test_every_layer_has_the_published_settings(name: str) -> None:
    ours, golden = as_lines([settings(layer) for layer in whitened(name)]), as_lines(GOLDEN[name]["layers"])
    if name == "mobilenetv2_cifar":  # the published one names its last convolution before the blocks
        ours, golden = sorted(ours), sorted(golden)
    assert ours == golden


def test_the_32x32_efficientnet_takes_mobilenets_settings_in_its_blocks() -> None:
    name = "efficientnet_b0_cifar"
    ours = [settings(layer) for layer in whitened(name)]
    assert len(ours) == 84
    assert as_lines([ours[0], ours[-1]]) == as_lines(GOLDEN[name]["layers"])
    assert [layer["n_iter"] for layer in ours if layer.get("groups", 1) > 1] == [1] * 16
    blocks = layers(on_meta(name), InvertedResidual)
    assert [block.project.conv.cfg.n_iter for block in blocks] == [1] * 16
    for block in blocks:
        assert block.project.conv.blocks.features == block.expand.conv.in_channels


@pytest.mark.parametrize("name", GOLDEN)
def test_sizes_are_the_published_ones_and_nothing_is_left_unwhitened(name: str) -> None:
    model, golden = on_meta(name), GOLDEN[name]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS.get(name, golden["parameters"])
    assert not layers(model, nn.modules.batchnorm._BatchNorm)
    assert len(layers(model, (nn.Conv2d, nn.Linear))) == len(whitened(name))
    assert traced(name)[1] == golden["macs"]


@pytest.mark.parametrize("name", GOLDEN)
def test_stages_have_the_published_shapes(name: str) -> None:
    shapes, _ = traced(name)
    cifar = name.endswith("_cifar")
    names = next((table for start, table in STAGES.items() if name.startswith(start) and cifar), {})
    if name.startswith(("resnet", "vgg")) and not cifar:
        names = TIMM_STAGES
    stages = {stage: shape for stage, shape in GOLDEN[name]["stages"].items() if cifar or stage != "avgpool"}
    assert {stage: shapes[names.get(stage, stage)] for stage in stages} == stages
