"""The loop: learns, repeats itself, resumes bit for bit, and does what each setting says."""

import math

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from timm_deconv.errors import InputError
from timm_deconv.training import loop
from timm_deconv.training.checkpoint import read_curve
from timm_deconv.training.loop import create_accelerator, train
from timm_deconv.training.network import create_model
from timm_deconv.training.optimisation import create_optimizer, create_scheduler
from timm_deconv.training.tasks import Classification


def _weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def _distance(first, second):
    """Relative distance of two sets of weights."""
    pairs = [(first[name].double(), second[name].double()) for name in first if first[name].is_floating_point()]
    return math.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs))


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_small_network_reads_nine_digits_of_ten_after_two_epochs(recipe, tmp_path):
    row = train(recipe.merged({"epochs": 2, "batch_size": 64}), tmp_path)
    curve = read_curve(tmp_path)
    assert row["top1"] > 90 and float(curve[1]["train_loss"]) < float(curve[0]["train_loss"])
    assert (row["top1"], row["best_top1"]) == (float(curve[1]["top1"]), max(float(epoch["top1"]) for epoch in curve))
    assert (row["model"], row["recipe"], row["dataset"], row["parameters"]) == (
        "test_resnet",
        "digits",
        "digits",
        373658,
    )
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(short_recipe, tmp_path, workers):
    recipe = short_recipe.merged({"workers": workers})
    first, second = train(recipe, tmp_path / "a"), train(recipe, tmp_path / "b")
    assert first["train_loss"] == second["train_loss"]
    assert _same(_weights(tmp_path / "a"), _weights(tmp_path / "b"))
    if workers == 0:
        assert train(recipe.merged({"seed": 1}), tmp_path / "c")["train_loss"] != first["train_loss"]


def test_a_run_cut_off_and_resumed_ends_bit_for_bit_where_it_would_have(short_recipe, tmp_path, monkeypatch):
    recipe = short_recipe.merged({"epochs": 3, "model_ema": True, "model_ema_decay": 0.9})
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", _cut_off_at_the_second_call())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "cut")
    assert len(read_curve(tmp_path / "cut")) == 1
    resumed = train(recipe, tmp_path / "cut", resume=True)
    assert _same(_weights(tmp_path / "cut"), _weights(tmp_path / "whole"))
    assert resumed["train_loss"] == whole["train_loss"] and len(read_curve(tmp_path / "cut")) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, raised while it compiles
def test_a_compiled_run_is_saved_and_resumed_as_what_it_compiles(short_recipe, tmp_path, monkeypatch):
    torch._dynamo.reset()
    recipe = short_recipe.merged({"epochs": 2})
    eager = train(recipe, tmp_path / "eager")
    recipe = recipe.merged({"torchcompile": "eager"})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", _cut_off_at_the_second_call())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "compiled")
    compiled = train(recipe, tmp_path / "compiled", resume=True)
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3)
    assert _weights(tmp_path / "compiled").keys() == _weights(tmp_path / "eager").keys()
    assert _distance(_weights(tmp_path / "compiled"), _weights(tmp_path / "eager")) < 1e-3
    assert timm.create_model(f"local-dir:{tmp_path / 'compiled'}", pretrained=True)


def _cut_off_at_the_second_call():
    calls, original = [], loop.evaluate

    def evaluate(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    return evaluate


def test_two_half_batches_accumulated_are_one_batch(short_recipe, tmp_path):
    plain = short_recipe.merged({"model": "test_convnext", "augmentation": "none"})  # no statistics of a batch in it
    train(plain, tmp_path / "one")
    train(plain.merged({"batch_size": 64, "grad_accum_steps": 2}), tmp_path / "two")
    start = create_model(plain).state_dict()
    moved = _distance(start, _weights(tmp_path / "one"))
    assert _distance(_weights(tmp_path / "two"), _weights(tmp_path / "one")) < 1e-4 < moved


def test_the_rate_follows_the_cosine_to_zero_at_every_update(recipe):
    recipe = recipe.merged({"lr": 0.1, "epochs": 2})
    optimizer = create_optimizer(create_model(recipe), recipe)
    scheduler = create_scheduler(optimizer, recipe, batches=5)
    rates = [optimizer.param_groups[0]["lr"]]
    for update in range(1, 11):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 10)) for t in range(11)], abs=1e-9)


def test_warm_up_starts_low_and_a_floor_ends_the_schedule(recipe):
    recipe = recipe.merged({"lr": 0.1, "epochs": 3, "warmup_epochs": 1, "warmup_lr": 0.01, "min_lr": 0.02})
    optimizer = create_optimizer(create_model(recipe), recipe)
    scheduler = create_scheduler(optimizer, recipe, batches=4)
    assert optimizer.param_groups[0]["lr"] == 0.01
    scheduler.step_update(12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)


@pytest.mark.parametrize(("spared", "expected"), [(False, [1e-3]), (True, [0.0, 1e-3])])
def test_weight_decay_is_on_everything_as_published_unless_asked_otherwise(recipe, spared, expected):
    recipe = recipe.merged({"filter_bias_and_bn": spared})
    optimizer = create_optimizer(create_model(recipe), recipe)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == expected
    assert not optimizer.param_groups[0]["nesterov"]


def test_the_training_loss_is_smoothed_cross_entropy_and_evaluation_is_not(recipe):
    task = Classification(recipe.merged({"smoothing": 0.1}), torch.device("cpu"))
    model = task.create_model().eval()
    images, target = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    output = model((images / 255 - 0.3057) / 0.3237)
    loss, figures = task.loss(model, (images, target))
    assert loss.item() == pytest.approx(F.cross_entropy(output, target, label_smoothing=0.1).item(), rel=1e-4)
    plain = task.evaluate(model, (images, target))
    assert plain[:, 0].mean().item() == pytest.approx(F.cross_entropy(output, target).item(), rel=1e-4)
    assert torch.equal(figures[:, 1], (output.argmax(1) == target).float())
    assert torch.equal(figures[:, 2], (output.topk(5).indices == target[:, None]).any(1).float())


def test_float16_on_a_processor_is_refused_before_anything_is_written(recipe, tmp_path):
    half = recipe.merged({"amp": True, "amp_dtype": "float16"})
    with pytest.raises(InputError, match="amp_dtype='float16': a processor would train in float32"):
        train(half, tmp_path / "half", cpu=True)
    assert not (tmp_path / "half").exists()


def test_bfloat16_learns_nearly_what_float32_learns(short_recipe, tmp_path):
    full = train(short_recipe, tmp_path / "full")
    half = train(short_recipe.merged({"amp": True}), tmp_path / "half")
    assert half["train_loss"] != full["train_loss"]
    assert half["train_loss"] == pytest.approx(full["train_loss"], rel=0.05)
    assert all(value.dtype != torch.bfloat16 for value in _weights(tmp_path / "half").values())


def test_the_weights_saved_with_an_average_are_the_average(recipe, tmp_path):
    recipe = recipe.merged({"model_ema": True, "model_ema_decay": 0.9999})
    start = create_model_from_seed(recipe)
    train(recipe, tmp_path / "ema")
    train(recipe.merged({"model_ema": False}), tmp_path / "plain")
    # timm's average begins at the first update's weights and then hardly moves
    assert _distance(start, _weights(tmp_path / "ema")) < 0.2 * _distance(start, _weights(tmp_path / "plain"))


def create_model_from_seed(recipe):
    loop.random_seed(recipe.seed)
    return create_model(recipe).state_dict()


def test_clipping_bounds_the_step(recipe, tmp_path):
    recipe = recipe.merged({"clip_grad": 1e-4, "weight_decay": 0.0, "momentum": 0.0})
    start = create_model_from_seed(recipe)
    train(recipe, tmp_path)
    parameters = dict(create_model(recipe).named_parameters())
    moved = sum(((_weights(tmp_path)[name] - start[name]) ** 2).sum() for name in parameters)
    assert 0 < math.sqrt(moved) <= 11 * recipe.lr * 1e-4


@pytest.mark.parametrize("layer_rates", [False, True])
def test_clipping_adapted_to_the_weights_bounds_each_outputs_step_but_the_classifiers(recipe, tmp_path, layer_rates):
    network = {"model": "resnet18_cifar_deconv", "model_kwargs": {"width": 0.125}, "layer_rates": layer_rates}
    clipping = {"clip_grad": 1e-3, "clip_mode": "agc", "weight_decay": 0.0, "momentum": 0.0, "lr": 0.1}
    recipe = recipe.merged({**network, **clipping, "train_images": 128, "val_images": 10})
    start = create_model_from_seed(recipe)
    train(recipe, tmp_path)
    ended = _weights(tmp_path)
    moved = {  # in the one step, of an output's norm
        name: ((ended[name] - start[name]).flatten(1).norm(dim=1) / start[name].flatten(1).norm(dim=1)).max()
        for name, parameter in create_model(recipe).named_parameters()
        if parameter.ndim > 1
    }
    assert moved.pop("fc.weight") > 2e-4
    assert all(0.99e-4 < share < 1.01e-4 for share in moved.values())


def test_an_unknown_model_is_answered_with_the_nearest_names(recipe, tmp_path):
    with pytest.raises(InputError, match=r"no model 'resnet18_cifar_deconvv'; nearest: .*resnet18_cifar_deconv"):
        train(recipe.merged({"model": "resnet18_cifar_deconvv"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_wrong_number_of_classes_is_refused_before_training(recipe, tmp_path):
    with pytest.raises(InputError, match="num_classes=9, but the training images have 10 classes"):
        train(recipe.merged({"num_classes": 9}), tmp_path / "run")


def test_a_batch_that_does_not_divide_into_the_processes_is_refused(recipe, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    with pytest.raises(InputError, match="batch_size=128 does not divide into 3 processes"):
        create_accelerator(recipe)
