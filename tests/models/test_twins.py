"""The batch-norm forms: the published sizes and layers, timm's contract, and structure that survives without norms."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_deconv.models  # noqa: F401 (registers the networks)
from tests.golden_files import golden_folder
from tests.models.timm_contract import CHECKS, DENSE_CHECKS, Subject, gradients, same
from timm_deconv.models.deeplabv3 import ImagePool
from timm_deconv.models.densenet import DenseLayer
from timm_deconv.models.dpn import DualPathBlock
from timm_deconv.models.mobilenetv2 import InvertedResidual
from timm_deconv.models.pnasnet import CellA
from timm_deconv.models.preact_resnet import PreActBlock

CIFAR = [
    "vgg11_cifar",
    "vgg13_cifar",
    "vgg16_cifar",
    "vgg19_cifar",
    "resnet18_cifar",
    "resnet50_cifar",
    "resnet18_025_cifar",
    "preact_resnet18_cifar",
    "densenet121_cifar",
    "resnext29_32x4d_cifar",
    "mobilenetv2_cifar",
    "dpn92_cifar",
    "pnasnet_a_cifar",
    "senet18_cifar",
    "efficientnet_b0_cifar",
]
ONE_BLOCK_A_STAGE: dict[str, dict[str, Any]] = {
    "densenet121_cifar": {"layers": (1, 1, 1, 1)},
    "dpn92_cifar": {"layers": (1, 1, 1, 1)},
    "efficientnet_b0_cifar": {
        "groups": ((1, 16, 1, 2), (6, 24, 1, 1), (6, 40, 1, 2), (6, 80, 1, 2), (6, 192, 1, 2), (6, 320, 1, 2))
    },
    "mobilenetv2_cifar": {"groups": ((1, 16, 1, 1), (6, 32, 1, 2), (6, 64, 1, 2), (6, 160, 1, 2))},
    "pnasnet_a_cifar": {"cells": 1},
    "preact_resnet18_cifar": {"layers": (1, 1, 1, 1)},
    "resnet18_cifar": {"layers": (1, 1, 1, 1)},
    "resnext29_32x4d_cifar": {"layers": (1, 1, 1)},
    "senet18_cifar": {"layers": (1, 1, 1, 1)},
    "vgg11_cifar": {},
}
"""The ten 32x32 families, with arguments that make a block a stage."""

DENSE = ["deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50"]
OURS = ("resnet50_cifar", "resnet18_025_cifar")
"""32x32 networks that are not among the published ones."""
PUBLISHED = [name for name in CIFAR if name not in OURS] + DENSE + [f"{name}_aux" for name in DENSE]
WHITENED = [name for name in CIFAR if name not in (*OURS, "efficientnet_b0_cifar")]
"""Published without any batch norm; the published ImageNet ResNets of the dense networks keep four."""

STAGED = {"conv1": "stem.conv", "bn1": "stem.norm", "linear": "head"}
STAGED |= {f"layer{i}": f"stages.{i - 1}" for i in range(1, 5)}
DENSE_STAGES = {f"dense{i}": f"stages.{i - 1}" for i in range(1, 5)}
DENSE_STAGES |= {f"trans{i}": f"stages.{i}.0" for i in range(1, 4)}
STAGES: dict[str, dict[str, str]] = {
    "vgg": {"features": "final", "classifier": "head"},
    "resnet": {"linear": "fc"},
    "preact": STAGED | {"conv1": "stem"},
    "densenet": STAGED | DENSE_STAGES | {"conv1": "stem", "bn": "final"},
    "mobilenet": STAGED | {"layers": "stages", "conv2": "final.conv", "bn2": "final.norm"},
    "pnasnet": STAGED | {"layer2": "stages.1.0", "layer3": "stages.1", "layer4": "stages.2.0", "layer5": "stages.2"},
    "efficientnet": STAGED | {"layers": "stages"},
    "resnext": STAGED,
    "dpn": STAGED,
    "senet": STAGED,
}
"""Published stage -> module, by the start of the name; a stage that is not here has its module's name."""


@cache
def published(name: str) -> dict[str, Any]:
    golden = json.loads((golden_folder() / "architectures.json").read_text())
    return golden["cifar"][name.removesuffix("_cifar")] if name.endswith("_cifar") else golden["segmentation"][name]


@cache
def on_meta(name: str) -> nn.Module:
    """The network at full width without storage; dense ones with auxiliary head run in training mode."""
    with torch.device("meta"):
        model = timm.create_model(name.removesuffix("_aux"), **({"aux_head": True} if name.endswith("_aux") else {}))
    return model.train(name.endswith("_aux"))


def layers(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def geometry(conv: nn.Conv2d) -> tuple[int, ...]:
    """Channels in and out, kernel, stride, padding, dilation (one number each, as all are square), groups."""
    pairs = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    assert all(a == b for a, b in pairs)
    return conv.in_channels, conv.out_channels, *(pair[0] for pair in pairs), conv.groups


def without_norms(model: nn.Module) -> nn.Module:
    """Batch norms become identities, as in conversion."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, nn.Identity())
    return model


def shapes_and_macs(model: nn.Module, size: int) -> tuple[dict[str, list[int]], int]:
    """Output shape of each module for one image, and multiply-accumulates of convolutions and linear layers."""
    shapes: dict[str, list[int]] = {}
    macs = []

    def note(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = list(output.shape[1:])
            if isinstance(module, nn.Conv2d | nn.Linear):
                macs.append(output[0].numel() * module.weight[0].numel())

        return hook

    handles = [m.register_forward_hook(note(n, m)) for n, m in model.named_modules()]
    model(torch.empty(2, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return shapes, sum(macs)


def test_every_network_is_registered_and_no_other() -> None:
    assert sorted(timm.list_models("*_cifar")) == sorted(CIFAR)
    assert not [name for name in DENSE if not timm.is_model(name)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_macs_and_norms_are_the_published_ones(name: str) -> None:
    model, golden = on_meta(name), published(name)["batch_norm"]
    unused = name == "preact_resnet18_cifar"  # the published one registers a norm of 64 channels that it never uses
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"] - 128 * unused
    assert len(layers(model, nn.BatchNorm2d)) == golden["batch_norms"] - unused
    assert len(layers(model, (nn.Conv2d, nn.Linear))) == golden["plain_layers"]
    assert shapes_and_macs(model, golden["input"][-1])[1] == golden["macs"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_stages_have_the_published_shapes(name: str) -> None:
    model, golden = on_meta(name), published(name)["batch_norm"]
    shapes, _ = shapes_and_macs(model, golden["input"][-1])
    names = next((table for start, table in STAGES.items() if name.startswith(start)), {})
    assert {stage: shapes[names.get(stage, stage)] for stage in golden["stages"]} == golden["stages"]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("efficientnet")])
def test_convolutions_are_the_published_whitened_layers(name: str) -> None:
    keys = ("in_channels", "out_channels", "kernel", "stride", "padding", "dilation", "groups")
    golden = published(name)["deconv"]["layers"]
    rows = [tuple(layer[key] for key in keys) for layer in golden if layer["kind"] == "conv"]
    ours = [geometry(conv) for conv in layers(on_meta(name), nn.Conv2d)]
    if name == "mobilenetv2_cifar":  # the published one names its last convolution before the blocks
        assert Counter(ours) == Counter(rows)
    else:
        assert ours == rows


@pytest.mark.parametrize(
    ("name", "parameters"),
    [(name, published(name)["deconv"]["parameters"]) for name in WHITENED]
    + [
        ("resnet50_cifar", 23_494_282),
        ("efficientnet_b0_cifar", 2_892_193),
        ("deeplabv3_resnet50", 39_610_517),
        ("fcn_resnet50", 32_929_941),
    ],
)
def test_biases_in_place_of_norms_give_the_deconvolution_form_its_parameters(name: str, parameters: int) -> None:
    model = on_meta(name)
    count = sum(p.numel() for p in model.parameters())
    count -= sum(2 * norm.num_features for norm in layers(model, nn.BatchNorm2d))
    count += sum(conv.out_channels for conv in layers(model, nn.Conv2d) if conv.bias is None)
    assert count == parameters


def test_resnet50_cifar_has_its_stated_parameters() -> None:
    assert sum(p.numel() for p in on_meta("resnet50_cifar").parameters()) == 23_520_842


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CIFAR)
def test_timm_contract(name: str, check: Callable[[Subject], None]) -> None:
    check(Subject(name, {"width": 0.25, **ONE_BLOCK_A_STAGE.get(name, {})}))


@pytest.mark.parametrize("check", DENSE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50"])
def test_timm_contract_of_dense_networks(name: str, check: Callable[[Subject], None]) -> None:
    check(Subject(name, {"layers": [1, 1, 1, 1]}, size=33))


@pytest.mark.parametrize("name", [*CIFAR, "deeplabv3_resnet50", "fcn_resnet50"])
def test_without_norms_nothing_is_overwritten_that_another_branch_reads(name: str) -> None:
    kwargs = {"width": 0.25} if name in CIFAR else {"drop_rate": 0.0, "layers": [2, 1, 1, 2]}
    model = without_norms(timm.create_model(name, **kwargs)).double()
    plain = copy.deepcopy(model)
    for module in layers(plain, nn.ReLU):
        module.inplace = False
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    (output, grads), (expected, expected_grads) = gradients(model, x), gradients(plain, x)
    exact = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(output, expected, **exact)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], **exact)
    for a, b in zip(model.forward_intermediates(x)[1], plain.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(a, b, **exact)


def randomised(module: nn.Module) -> nn.Module:
    """In evaluation, with running statistics and scales that are not trivial."""
    for norm in layers(module, nn.BatchNorm2d):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return module.eval()


@torch.no_grad()
def test_preact_shortcut_starts_behind_the_first_activation() -> None:
    x = torch.randn(2, 8, 6, 6)
    block = randomised(PreActBlock(8, 16, stride=2, se_reduction=4))
    active = F.relu(block.preact1.norm(x))
    out = block.conv2(F.relu(block.preact2.norm(block.conv1(active))))
    gate = torch.sigmoid(block.se.fc2(F.relu(block.se.fc1(out.mean((2, 3), keepdim=True)))))
    same(block(x), out * gate + block.shortcut(active))
    block = randomised(PreActBlock(8, 8))
    same(block(x) - x, block.conv2(F.relu(block.preact2.norm(block.conv1(F.relu(block.preact1.norm(x)))))))


@torch.no_grad()
def test_inverted_residual_adds_a_shortcut_at_stride_1_only() -> None:
    x = torch.randn(2, 8, 6, 6)
    for stride, out_chs in ((1, 8), (1, 16), (2, 16)):
        block = randomised(InvertedResidual(8, out_chs, 3, stride=stride, se_reduction=4))
        out = F.relu(block.expand.norm(block.expand.conv(x)))
        out = block.project.norm(block.project.conv(F.relu(block.depthwise.norm(block.depthwise.conv(out)))))
        out = out * torch.sigmoid(block.se.fc2(F.relu(block.se.fc1(out.mean((2, 3), keepdim=True)))))
        if stride == 1:
            out = out + (x if out_chs == 8 else block.shortcut.norm(block.shortcut.conv(x)))
        same(block(x), out)


@torch.no_grad()
def test_dual_path_block_adds_one_path_and_appends_the_other() -> None:
    x = torch.randn(2, 20, 6, 6)
    block = randomised(DualPathBlock(20, 8, 16, 4, groups=2, stride=1, project=False))
    out = block.conv3(block.conv2(block.conv1(x)))
    same(block(x)[:, :16], F.relu(x[:, :16] + out[:, :16]))
    same(block(x)[:, 16:20], F.relu(x[:, 16:]))
    same(block(x)[:, 20:], F.relu(out[:, 16:]))
    first = randomised(DualPathBlock(20, 8, 16, 4, groups=2, stride=2, project=True))
    wide, out = first.shortcut.norm(first.shortcut.conv(x)), first.conv3(first.conv2(first.conv1(x)))
    same(first(x), F.relu(torch.cat([wide[:, :16] + out[:, :16], wide[:, 16:], out[:, 16:]], 1)))


@torch.no_grad()
def test_cell_adds_a_separable_convolution_and_a_max_pool() -> None:
    x = torch.randn(2, 8, 6, 6)
    for stride, out_chs in ((1, 8), (2, 16)):
        cell = randomised(CellA(8, out_chs, stride=stride))
        pooled = F.max_pool2d(x, 3, stride, 1)
        pooled = cell.project.norm(cell.project.conv(pooled)) if stride == 2 else pooled
        same(cell(x), F.relu(cell.separable.norm(cell.separable.conv(x)) + pooled))


@torch.no_grad()
def test_dense_layer_puts_its_channels_in_front() -> None:
    x = torch.randn(2, 8, 6, 6)
    layer = randomised(DenseLayer(8, 4, 16))
    new = layer.conv2(F.relu(layer.preact2.norm(layer.conv1(F.relu(layer.preact1.norm(x))))))
    same(layer(x), torch.cat([new, x], 1))
    layer.new_in_front = False
    same(layer(x), torch.cat([x, new], 1))


@torch.no_grad()
def test_image_pooling_is_the_enlarged_mean() -> None:
    x = torch.randn(2, 8, 5, 7)
    pool = randomised(ImagePool(8, 4))
    small = F.relu(pool.conv.norm(pool.conv.conv(x.mean((2, 3), keepdim=True))))
    same(pool(x), F.interpolate(small, size=(5, 7), mode="bilinear"))


def test_half_width_vgg11_has_half_the_channels() -> None:
    model = timm.create_model("vgg11_cifar", width=0.5)
    assert [conv.out_channels for conv in layers(model, nn.Conv2d)] == [32, 64, 128, 128, 256, 256, 256, 256]


@pytest.mark.parametrize("name", CIFAR)
def test_weights_start_as_pytorch_makes_them(name: str) -> None:
    model = timm.create_model(name, width=0.25)
    for conv in layers(model, nn.Conv2d):
        bound = (conv.weight[0].numel()) ** -0.5
        assert conv.weight.abs().max() <= bound * 1.0001
    assert all(bool((norm.weight == 1).all()) and not norm.bias.any() for norm in layers(model, nn.BatchNorm2d))


def test_resnet_output_stride_dilates_instead() -> None:
    model = timm.create_model("resnet18_cifar", width=0.25, output_stride=4)
    assert model.forward_features(torch.randn(2, 3, 32, 32)).shape[2:] == (8, 8)
    assert model.feature_info[-1]["reduction"] == 4
    assert model.layer4[1].conv2.dilation == (2, 2)


def test_networks_take_other_sizes() -> None:
    for name in CIFAR:
        assert timm.create_model(name, width=0.25).eval()(torch.randn(1, 3, 48, 40)).shape == (1, 10)


@torch.no_grad()
def test_dense_network_gives_logits_at_any_input_size_and_batch_1() -> None:
    model = timm.create_model("deeplabv3_resnet50", num_classes=5).eval()
    assert model(torch.randn(1, 3, 41, 57)).shape == (1, 5, 41, 57)


def test_auxiliary_head_speaks_in_training_only() -> None:
    model = timm.create_model("fcn_resnet50", num_classes=5, aux_head=True, drop_rate=0.0)
    x = torch.randn(2, 3, 33, 33)
    assert [tuple(out.shape) for out in model(x)] == [(2, 5, 33, 33)] * 2
    sum(out.mean() for out in model(x)).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.reset_classifier(3)
    assert [out.shape[1] for out in model(x)] == [3, 3]
    assert model.eval()(x).shape == (2, 3, 33, 33)


def test_output_stride_16_halves_dilations_and_rates() -> None:
    with torch.device("meta"):
        model = timm.create_model("deeplabv3_resnet50", output_stride=16)
    assert model.forward_features(torch.empty(2, 3, 64, 64, device="meta")).shape[2:] == (4, 4)
    assert [branch.conv.dilation[0] for branch in model.decoder[0].branches[1:4]] == [6, 12, 18]


def test_weights_with_an_auxiliary_head_load_into_a_network_without_one() -> None:
    trained = timm.create_model("fcn_resnet50", aux_head=True)
    overlay = {"state_dict": trained.state_dict()}
    for options in ({}, {"aux_head": True, "num_classes": 3}):
        model = timm.create_model("fcn_resnet50", pretrained=True, pretrained_cfg_overlay=overlay, **options)
        same(model.decoder[0].conv.weight, trained.decoder[0].conv.weight)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg11_cifar", {"width": 0}, r"width=0: .* must be positive"),
        ("resnet18_cifar", {"width": -1.0}, r"width=-1\.0: .* must be positive"),
        ("fcn_resnet50", {"output_stride": 32}, r"output_stride=32: .* 8 or 16"),
    ],
)
def test_wrong_arguments_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **options)
