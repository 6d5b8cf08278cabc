"""Rates by layer: a step turns every whitened layer as if its rows had norm 1."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from timm_deconv.convert import calibrate
from timm_deconv.layers import Deconv2d, DeconvCfg, DeconvLinear
from timm_deconv.training import Recipe
from timm_deconv.training.lr_scale import layer_lr_scales
from timm_deconv.training.optimisation import create_optimizer, create_scheduler


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("resnet18_cifar_deconv", width=0.25)


def test_a_step_turns_a_layer_as_if_its_rows_had_norm_one(recipe: Recipe) -> None:
    """With w = s v and rows of v of norm 1 a step on v is s times the gradient, so w takes s^2 times it."""
    layer = Deconv2d(3, 8, 3, bias=False)
    nn.init.normal_(layer.weight)
    rows = layer.weight.detach().flatten(1)
    layer.weight.data = (rows / rows.norm(dim=1, keepdim=True) * 3).reshape(layer.weight.shape)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 2))
    before = layer.weight.detach().clone()
    optimiser = create_optimizer(model, recipe.merged({"layer_rates": True, "lr": 0.1, "weight_decay": 0.0}))
    create_scheduler(optimiser, recipe, 10)
    model(torch.randn(64, 3, 3, 3)).square().mean().backward()
    optimiser.step()
    torch.testing.assert_close(before - layer.weight, 0.1 * 9 * layer.weight.grad)


def test_decay_takes_the_same_share_of_every_weight_whatever_its_rate(recipe: Recipe, model: nn.Module) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.any()}
    optimiser = create_optimizer(model, recipe.merged({"layer_rates": True, "lr": 0.1, "weight_decay": 0.01}))
    create_scheduler(optimiser, recipe, 10)
    assert len({group["lr"] for group in optimiser.param_groups}) > 10
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, value in before.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), (1 - 0.1 * 0.01) * value)


def test_a_step_of_a_whitened_classifier_is_as_large_as_an_unwhitened_one(recipe: Recipe) -> None:
    """Gradients that point everywhere alike move the folded weight as far as they move the weight of a plain layer."""
    x = torch.randn(4096, 16) * torch.logspace(-1, 1, 16)
    classifier = DeconvLinear(16, 64, cfg=DeconvCfg(block=16))
    calibrate(nn.Sequential(classifier), [x])
    model = nn.Sequential(OrderedDict(fc=classifier))
    model.get_classifier = lambda: classifier
    (name, scale), *others = layer_lr_scales(model).items()
    assert name == "fc.weight" and not others
    gradient = torch.randn(64, 16)
    whitener = classifier.running_deconv
    moved = scale * (gradient @ whitener) @ whitener
    directions = torch.linalg.eigh(whitener).eigenvectors
    lengths = (moved @ directions).square().mean(0).sqrt() / (gradient @ directions).square().mean(0).sqrt()
    assert lengths.mean().item() == pytest.approx(1, rel=1e-4)


def test_every_whitened_layer_has_its_rate_and_every_parameter_is_trained_once(
    recipe: Recipe, model: nn.Module
) -> None:
    scales = layer_lr_scales(model)
    assert scales["fc.weight"] == pytest.approx(1), "an identity whitener changes no step"
    name, scale = next(iter(scales.items()))
    assert scale == pytest.approx(model.get_parameter(name).flatten(1).norm(dim=1).square().mean().item())
    optimiser = create_optimizer(model, recipe.merged({"layer_rates": True, "filter_bias_and_bn": True}))
    create_scheduler(optimiser, recipe.merged({"sched": "constant"}), 10)
    seen = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters())
    rates = {id(group["params"][0]): group["lr"] for group in optimiser.param_groups if "lr_scale" in group}
    assert rates == {id(model.get_parameter(name)): pytest.approx(recipe.lr * scale) for name, scale in scales.items()}


def test_a_branch_that_starts_at_zero_can_leave_it() -> None:
    layer = Deconv2d(3, 8, 1)
    nn.init.zeros_(layer.weight)
    assert layer_lr_scales(nn.Sequential(layer)) == {"0.weight": 1.0}


def test_batch_norm_networks_have_no_rates_by_layer(recipe: Recipe) -> None:
    assert layer_lr_scales(timm.create_model("test_resnet")) == {}
