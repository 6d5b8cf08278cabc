"""Registered networks whose activations write in place compute what they would compute out of place."""

import copy

import pytest
import timm
import torch
from torch import nn

import timm_deconv  # noqa: F401 (registers the networks)
from timm_deconv.convert.module_replace import write_out_of_place, writes_in_place

NETWORKS = {
    "vgg11_deconv": {"mlp_ratio": 1 / 64},
    "resnet18_deconv": {},
    "resnet50_deconv": {"layers": [1, 2, 1, 1]},
    "resnext50_32x4d_deconv": {"layers": [1, 1, 1, 1]},
    "seresnet50_deconv": {"layers": [1, 1, 1, 1]},
    "legacy_seresnet18_deconv": {},
    "legacy_senet154_deconv": {"layers": (1, 1, 1, 1)},
    "mobilenetv2_050_deconv": {},
    "efficientnet_b0_deconv": {},
    "tf_efficientnet_lite0_deconv": {},
    "deeplabv3_resnet50_deconv": {"layers": [1, 1, 1, 1]},
    **{
        f"{name}_cifar_deconv": {"width": 0.25}
        for name in "resnet18 vgg11 preact_resnet18 densenet121 resnext29_32x4d mobilenetv2 dpn92 pnasnet_a senet18"
        " efficientnet_b0".split()
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_overwritten_that_another_branch_reads(name: str) -> None:
    kwargs = {} if name.startswith("legacy") else {"num_classes": 10}
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs, **NETWORKS[name]).eval()
    other = copy.deepcopy(model)
    write_out_of_place(other)
    x = torch.randn(2, 3, 64, 64)
    output, expected = model(x), other(x)
    assert torch.equal(output, expected)
    output.square().mean().backward()
    expected.square().mean().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6 * float(theirs.grad.abs().max()))


def test_networks_with_norms_before_the_convolutions_write_out_of_place() -> None:
    for name in ("densenet121_deconv", "dpn68_deconv", "resnetv2_50_deconv"):
        with torch.device("meta"):
            assert not writes_in_place(timm.create_model(name))
    assert writes_in_place(timm.create_model("resnet18_cifar_deconv"))


def test_a_new_classifier_leaves_activations_as_they_are() -> None:
    model = timm.create_model("resnet18_cifar_deconv", width=0.25)
    model.reset_classifier(3)
    assert [m.inplace for m in model.modules() if isinstance(m, nn.ReLU)] == [True] * 17
