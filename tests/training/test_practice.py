"""What modern recipes ask for does what it says: each key against what it promises, on whitened networks."""

import json
import math
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

import timm_deconv  # noqa: F401 - registers the networks
from benchmarks.killing import start
from timm_deconv.data import Digits, as_bytes
from timm_deconv.errors import InputError
from timm_deconv.layers import WhiteningMixin
from timm_deconv.training import load_recipe
from timm_deconv.training.compiling import compile_regions
from timm_deconv.training.loop import train
from timm_deconv.training.network import create_model
from timm_deconv.training.optimisation import create_optimizer, create_scheduler

WHITENED = {"model": "resnet18_cifar_deconv", "model_kwargs": {"width": 0.125}}


@pytest.fixture
def whitened(recipe):
    """Four small updates of a small whitened network, in which rounding does not grow."""
    return recipe.merged({**WHITENED, "batch_size": 64, "train_images": 256, "val_images": 128, "lr": 1e-3})


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def distance(first, second):
    """Relative distance of two sets of weights and running values."""
    pairs = [(first[name].double(), second[name].double()) for name in first if first[name].is_floating_point()]
    return math.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs))


def digits(train):
    dataset = Digits(train=train, transform=as_bytes(3))
    images, targets = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return (torch.stack(images) / 255 - 0.3057) / 0.3237, torch.tensor(targets)


@torch.no_grad()
def accuracy(model, images, targets):
    return 100 * (model.eval()(images).argmax(1) == targets).float().mean().item()


def test_bfloat16_keeps_weights_and_statistics_in_float32_and_learns_nearly_the_same(whitened, tmp_path):
    rows = [train(whitened.merged({"amp": amp}), tmp_path / str(amp), cpu=True) for amp in (False, True)]
    full, half = (weights(tmp_path / str(amp)) for amp in (False, True))
    assert all(value.dtype == torch.float32 for value in half.values() if value.is_floating_point())
    assert 0 < distance(half, full) < 0.05
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 is for GPUs")
def test_float16_with_its_scaler_learns_nearly_the_same(whitened, tmp_path):
    half = {"amp": True, "amp_dtype": "float16"}
    rows = [train(whitened.merged(keys), tmp_path / str(len(keys))) for keys in ({}, half)]
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=0.05)


def test_accumulated_passes_whiten_each_by_its_own_statistics(whitened, tmp_path):
    plain = whitened.merged({"augmentation": "none", "lr": 1e-30})  # weights stay
    train(plain, tmp_path / "passes", cpu=True)
    train(plain.merged({"grad_accum_steps": 4}), tmp_path / "accumulated", cpu=True)
    passes, accumulated = weights(tmp_path / "passes"), weights(tmp_path / "accumulated")
    assert accumulated["conv1.num_batches_tracked"] == 4
    assert all(torch.equal(accumulated[name], passes[name]) for name in passes if "running" in name)


def test_an_averaged_network_evaluates_as_well_as_the_plain_one(recipe, tmp_path):
    recipe = recipe.merged({**WHITENED, "batch_size": 64, "epochs": 3, "train_images": 1024})
    plain = train(recipe, tmp_path / "plain", cpu=True)
    averaged = train(recipe.merged({"model_ema": True, "model_ema_decay": 0.8}), tmp_path / "ema", cpu=True)
    assert plain["train_loss"] == averaged["train_loss"]
    assert distance(weights(tmp_path / "ema"), weights(tmp_path / "plain")) > 0.01
    assert plain["top1"] > 75 and averaged["top1"] > plain["top1"] - 6  # seeds differ by 4


def test_timms_average_in_a_foreign_loop_averages_whiteners_too():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar_deconv", num_classes=10, width=0.125)
    optimizer, average = create_optimizer_v2(model, opt="momentum", lr=0.1), ModelEmaV3(model, decay=0.7)
    images, targets = digits(train=True)
    expected = torch.empty(0)
    for step, chosen in enumerate(torch.randperm(len(images))[:1280].split(64), 1):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 21)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images[chosen]), targets[chosen]).backward()
        optimizer.step()
        average.update(model, step)
        seen = model.conv1.running_deconv.clone()
        expected = seen if step == 1 else torch.lerp(expected, seen, 0.3)
    torch.testing.assert_close(average.module.conv1.running_deconv, expected)
    test = digits(train=False)
    plain = accuracy(model, *test)
    assert plain > 70 and accuracy(average.module, *test) > plain - 3


def test_channels_last_is_the_layout_of_weights_and_images_and_changes_nothing_else(whitened, tmp_path):
    rows = [train(whitened.merged({"channels_last": on}), tmp_path / str(on), cpu=True) for on in (True, False)]
    assert distance(weights(tmp_path / "True"), weights(tmp_path / "False")) < 3e-3
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-3)
    model = create_model(whitened)
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    model.layer4.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    model(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen)


def test_checkpointed_activations_take_less_memory_and_train_the_same(whitened, tmp_path):
    for on in (False, True):
        train(whitened.merged({"grad_checkpointing": on}), tmp_path / str(on), cpu=True)
    assert distance(weights(tmp_path / "True"), weights(tmp_path / "False")) < 1e-5
    kept = [saved_bytes(create_model(whitened.merged({"grad_checkpointing": on}))) for on in (False, True)]
    assert kept[1] < 0.6 * kept[0]
    with pytest.raises(InputError, match="grad_checkpointing: vgg11 has no blocks to run twice"):
        create_model(whitened.merged({"model": "vgg11", "model_kwargs": {}, "grad_checkpointing": True}))


def saved_bytes(model):
    """Bytes that a forward pass keeps for its way back, each tensor once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(torch.randn(32, 3, 32, 32))
    assert output.requires_grad
    return sum(kept.values())


def test_layer_decay_falls_from_the_classifier_to_the_stem(whitened):
    recipe = whitened.merged({"layer_decay": 0.5, "lr": 0.1})
    model = create_model(recipe)
    optimizer = create_optimizer(model, recipe)
    create_scheduler(optimizer, recipe, 10).step_update(0)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = [
        rates[id(model.get_submodule(name).weight)] for name in ("fc", "layer4.1.conv2", "layer2.0.conv1", "conv1")
    ]
    assert len(rates) == len(list(model.parameters())) and found[0] == 0.1
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
    assert rates[id(model.layer4[0].conv1.weight)] == pytest.approx(0.5 * rates[id(model.layer4[1].conv1.weight)])
    with pytest.raises(InputError, match="layer_decay scales the rates that layer_rates and aux_lr_scale do"):
        recipe.merged({"layer_rates": True})


BY_SHAPE = "muon adamuon nadamuon nmuon lamb lars adafactorbv lion adamw sgdw mars".split()
"""Optimisers that treat matrices or layers as a whole, and some that do not; `test_state_files` has all."""


@pytest.mark.parametrize("name", BY_SHAPE)
@pytest.mark.filterwarnings("ignore")  # what optimisers of timm say of themselves
def test_optimisers_of_every_kind_train_a_whitened_network(name):
    torch.manual_seed(0)
    recipe = load_recipe("digits", [f"opt={name}", "lr=0.001"]).merged(WHITENED)
    model = create_model(recipe)
    optimizer = create_optimizer(model, recipe)
    images, targets = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    assert all(torch.isfinite(value).all() for value in model.parameters())
    assert sum(not torch.equal(value, before[key]) for key, value in model.named_parameters()) > 0.9 * len(before)


def test_muon_orthogonalises_the_updates_of_matrices(whitened):
    recipe = whitened.merged({"opt": "muon", "lr": 0.02, "momentum": 0.0, "weight_decay": 0.0})
    model = create_model(recipe)
    optimizer = create_optimizer(model, recipe)
    layer = model.layer3[0].conv2
    before = layer.weight.detach().clone()
    F.cross_entropy(model(torch.randn(32, 3, 32, 32)), torch.arange(32) % 10).backward()
    optimizer.step()
    values = torch.linalg.svdvals((layer.weight - before).detach().flatten(1))
    gradient = torch.linalg.svdvals(layer.weight.grad.flatten(1))
    assert values[0] < 1.2 * values[-1] and gradient[0] > 2 * gradient[-1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["sched=step", "decay_rate=0.1", "sched_kwargs.decay_epochs=2"], [1, 1, 0.1, 0.1, 0.01, 0.01]),
        (["sched=multistep", "decay_rate=0.1", "sched_kwargs.decay_milestones=[1,4]"], [1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        (["sched=poly", "decay_rate=1"], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (["sched=wsd", "sched_kwargs.decay_epochs=2", "sched_kwargs.decay_fn=linear"], [1, 1, 1, 1, 1, 0.5]),
        (["sched=rsqrt", "sched_kwargs.decay_epochs=1", "sched_kwargs.stable_timescale=1"], None),
        (["sched=tanh"], None),
        (["sched=cosine", "sched_kwargs.cycle_limit=2"], None),
        (["sched=constant"], [1] * 6),
    ],
)
def test_every_schedule_of_timm_is_followed_by_the_update(recipe, settings, expected):
    recipe = load_recipe("digits", ["epochs=6", "lr=1", *settings])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = create_scheduler(optimizer, recipe, batches=4)
    rates = [1.0]
    for update in range(1, 24):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    if expected is None:
        assert len(set(rates)) > 6 and max(rates) == 1
    else:
        assert rates[::4] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["opt=fusedadam"], r"opt='fusedadam' cannot be made: .*"),
        (["opt_kwargs.betaz=[0.9,0.99]", "opt=adamw"], r"opt='adamw' cannot be made with opt_kwargs=.*betaz"),
        (["sched_kwargs.decay_epoch=3"], r"no argument \(sched_kwargs\) .* 'decay_epoch'; nearest: .*decay_epochs"),
        (["sched_kwargs.min_lr=3"], r"no argument \(sched_kwargs\) .* 'min_lr'"),
    ],
)
def test_arguments_that_timm_does_not_take_are_named(settings, message):
    recipe = load_recipe("digits", settings)
    with pytest.raises(InputError, match=message) as refused:
        create_scheduler(create_optimizer(nn.Linear(2, 2), recipe), recipe, 4)
    assert "\n" not in str(refused.value)


def test_an_optimiser_of_second_derivatives_is_refused():
    with pytest.raises(InputError, match=r"opt='adahessian': .* second derivatives"):
        load_recipe("digits", ["opt=adahessian"])


def test_arguments_of_the_optimiser_reach_it():
    recipe = load_recipe("digits", ["opt=adamw", "opt_kwargs.betas=[0.8,0.9]"])
    assert list(create_optimizer(nn.Linear(2, 2), recipe).param_groups[0]["betas"]) == [0.8, 0.9]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, raised while it compiles
def test_a_network_compiled_by_regions_learns_what_an_uncompiled_one_learns(whitened, tmp_path):
    torch._dynamo.reset()
    few = whitened.merged({"model_kwargs": {"width": 0.125, "layers": [2, 1, 1, 1]}, "train_images": 128})
    eager = train(few, tmp_path / "eager", cpu=True)
    recipe = few.merged({"torchcompile": "eager", "torchcompile_regions": True, "health_interval": 2})
    torch._dynamo.utils.counters.clear()
    compiled = train(recipe, tmp_path / "compiled", cpu=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()
    assert distance(weights(tmp_path / "compiled"), weights(tmp_path / "eager")) < 1e-3


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("resnet18_cifar_deconv", {"conv1", "layer1.0", "layer1.1", "layer4.1", "fc"}),
        ("vgg11_cifar_deconv", {"stem.0.conv", "head.fc"}),
        ("densenet121_cifar_deconv", {"stem"}),
        ("mobilenetv2_100_deconv", {"blocks.2.0", "blocks.2.1"}),
    ],
)
def test_regions_are_the_blocks_of_a_network_and_cover_all_whitening(model, expected):
    network = timm.create_model(model)
    regions = compile_regions(network, "eager", None)
    assert expected <= set(regions) and len(set(regions)) == len(regions)
    whole = {region: network.get_submodule(region) for region in regions}
    inside = {f"{region}.{name}".rstrip(".") for region, part in whole.items() for name, _ in part.named_modules()}
    layers = {name for name, layer in network.named_modules() if isinstance(layer, WhiteningMixin)}
    assert layers <= inside


def test_compiling_settings_without_a_compiler_are_refused():
    with pytest.raises(InputError, match="torchcompile_mode and torchcompile_regions need torchcompile"):
        load_recipe("digits", ["torchcompile_regions=true"])


@pytest.mark.slow
def test_two_processes_learn_the_same_compiled_whole_or_by_regions(tmp_path):
    script = Path(__file__).with_name("compiled_processes.py")
    processes = start([sys.executable, str(script), str(tmp_path)], 2)
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told[0][1][-3000:]
    report = json.loads(told[0][0].splitlines()[-1])
    assert report["graphs"]["eager"] == 0 and min(report["graphs"]["whole"], report["graphs"]["regions"]) > 0
    eager = weights(tmp_path / "eager")
    for form in ("whole", "regions"):
        assert distance(weights(tmp_path / form), eager) < 1e-3
