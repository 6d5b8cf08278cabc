"""The forms that are compared are the same network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.baselines import PublishedChannel, PublishedConv2d, PublishedLinear
from benchmarks.networks import PublishedWindows, build, with_published_layers
from timm_deconv.layers import ChannelDeconv, Deconv2d, DeconvCfg, DeconvLinear


def whitened_network() -> nn.Sequential:
    """Every kind of layer: strided, grouped, depthwise, 1x1, blocks, frozen stem, flat windows, channels, linear."""
    frozen = DeconvCfg(freeze=True, freeze_iter=1, n_iter=15)
    return nn.Sequential(
        Deconv2d(3, 12, 3, padding=1, cfg=frozen),
        nn.ReLU(),
        Deconv2d(12, 8, 3, stride=2, padding=1, groups=2),
        Deconv2d(8, 8, 3, padding=1, groups=8, cfg=DeconvCfg(n_iter=1)),
        nn.ReLU(),
        Deconv2d(8, 10, 1, cfg=DeconvCfg(block=4, sampling_stride=2)),
        ChannelDeconv(10, cfg=DeconvCfg(block=4, eps=1e-2)),
        Deconv2d(10, 10, 3, cfg=DeconvCfg(block=6, layout="flat", sampling_stride=1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        DeconvLinear(10, 5, cfg=DeconvCfg(block=5)),
    ).double()


def test_published_layers_learn_what_ours_learn_over_steps_and_in_evaluation() -> None:
    ours = whitened_network()
    published = with_published_layers(copy.deepcopy(ours))
    kinds = [type(layer) for layer in published if not type(layer).__module__.startswith("torch.")]
    assert kinds == [PublishedConv2d] * 4 + [PublishedChannel, PublishedWindows, PublishedLinear]
    for step in range(4):
        x, labels = torch.randn(32, 3, 12, 12, dtype=torch.float64), torch.randint(5, (32,))
        for model in (ours, published):
            model.zero_grad()
            F.cross_entropy(model(x), labels).backward()
        for (name, a), b in zip(ours.named_parameters(), published.parameters(), strict=True):
            assert torch.allclose(a.grad.flatten(), b.grad.flatten(), rtol=1e-6, atol=1e-10), f"{name} in step {step}"
    assert torch.allclose(ours.eval()(x), published.eval()(x), rtol=1e-6)


def test_published_layers_take_over_statistics_and_freezing() -> None:
    ours = whitened_network()
    for _ in range(3):
        ours(torch.randn(32, 3, 12, 12, dtype=torch.float64))
    published = with_published_layers(ours)
    assert published[0].counter == 3
    before = published[0].running_mean.clone()
    assert before.abs().max() > 0
    published(torch.randn(32, 3, 12, 12, dtype=torch.float64))
    assert torch.equal(published[0].running_mean, before)


def test_an_option_that_the_published_layer_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no form of Deconv2d"):
        with_published_layers(nn.Sequential(Deconv2d(4, 4, 3, cfg=DeconvCfg(layout="window", block=2))))
    with pytest.raises(ValueError, match="no form of Deconv2d"):
        with_published_layers(nn.Sequential(Deconv2d(4, 4, (3, 1))))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenetv2_100"])
def test_without_norms_the_network_is_the_twin_with_batch_norm_folded(name: str) -> None:
    twin, none = build("twin", name).eval(), build("none", name).eval()
    assert not [module for module in none.modules() if isinstance(module, _BatchNorm)]
    none.load_state_dict({k: v for k, v in twin.state_dict().items() if k in none.state_dict()}, strict=False)
    # A fresh batch norm in evaluation mode is the identity, but for its epsilon.
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.eps = 1e-12  # not every torch takes 0
            nn.init.ones_(module.weight)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(none(x), twin(x), rtol=1e-4, atol=1e-5)


def test_an_unknown_pair_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"nearest: .*resnet18_cifar"):
        build("deconv", "resnet81_cifar")


def test_all_forms_have_the_same_convolutions_and_the_whitened_ones_the_same_parameters() -> None:
    forms = {form: build(form, "resnet18_cifar", width=0.125) for form in ("none", "twin", "deconv", "published")}

    def shapes(model: nn.Module) -> list[torch.Size]:
        return [module.weight.shape for module in model.modules() if isinstance(module, nn.Conv2d)]

    def parameters(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    assert len({tuple(shapes(model)) for model in forms.values()}) == 1
    assert parameters(forms["none"]) == parameters(forms["deconv"]) == parameters(forms["published"])
    assert parameters(forms["twin"]) > parameters(forms["none"])
