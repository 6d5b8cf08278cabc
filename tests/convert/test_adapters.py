"""Adapters that are merged into a weight are refused around whitening layers and work around fused ones."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.convert.networks import Tiny, images, trained
from timm_deconv import Deconv2d, convert_deconv_model, fuse
from timm_deconv.errors import InputError


class Adapter(nn.Module):
    """What PEFT does: dispatches by isinstance, makes A by the class of the layer, merges through `.data`."""

    def __init__(self, base: nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = type(base)(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
        self.lora_B = nn.Conv2d(rank, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merge(self) -> nn.Module:
        delta = torch.einsum("or,rikl->oikl", self.lora_B.weight.flatten(1), self.lora_A.weight)
        self.base_layer.weight.data += delta
        return self.base_layer


def adapted(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.pointwise = Adapter(model.pointwise)
    return model


def test_an_adapter_around_a_whitening_layer_is_refused_in_one_line_that_says_to_fuse() -> None:
    model = Tiny()
    convert_deconv_model(model)
    with pytest.raises(
        InputError, match=r"an adapter \(Adapter\) around a Deconv2d: .*timm_deconv\.fuse\(model\)"
    ) as error:
        adapted(model)
    assert "\n" not in str(error.value) and type(model.pointwise) is Deconv2d


def test_an_adapter_around_a_fused_layer_merges_exactly() -> None:
    model = Tiny()
    convert_deconv_model(model)
    x = images()
    trained(model, x)
    network = adapted(fuse(model)).eval()
    with torch.no_grad():
        expected = network(x)
        network.pointwise = network.pointwise.merge()
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_modules_that_merge_nothing_may_hold_whitening_layers_by_any_name() -> None:
    class Wrapper(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

    layer = Deconv2d(3, 4, 1)
    assert Wrapper(layer).base_layer is layer


def test_pefts_own_adapters_are_refused_and_work_on_the_fused_network() -> None:
    peft: Any = pytest.importorskip("peft")
    model = timm.create_model("resnet18_cifar_deconv", width=0.25)
    x = torch.randn(8, 3, 32, 32)
    trained(model, x)
    config = peft.LoraConfig(target_modules=r".*conv1", r=4)
    with pytest.raises(InputError, match=r"fuse\(model\)"):
        peft.get_peft_model(copy.deepcopy(model), config)
    network = peft.get_peft_model(fuse(model), config).eval()
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0, 0.05)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(network.merge_and_unload()(x), expected, rtol=1e-3, atol=1e-4)
