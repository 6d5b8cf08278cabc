"""Freezing, running values, non-finite batches, recomputation; evaluation by the present weights; files and copies."""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timm_deconv.layers import ChannelDeconv, Deconv2d, DeconvCfg, DeconvLinear
from timm_deconv.layers import module as layers_module
from timm_deconv.layers.notices import share_notices


def conv(**options) -> Deconv2d:
    return Deconv2d(3, 4, 3, padding=1, cfg=DeconvCfg(**options))


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def live_forwards(layer: nn.Module, forwards: int) -> list[bool]:
    """Of each training forward, whether it moved the running values."""
    moved = []
    for _ in range(forwards):
        before = layer.running_deconv.clone()
        layer(images())
        moved.append(not torch.equal(before, layer.running_deconv))
    return moved


def test_frozen_layers_thaw_in_cycles_as_published() -> None:
    cycle = [True] * 3 + [False] * 17
    assert live_forwards(conv(freeze=True, freeze_iter=2), 45) == (cycle * 3)[:45]


def test_the_freeze_counter_is_saved() -> None:
    layer, resumed = (conv(freeze=True, freeze_iter=2) for _ in range(2))
    live_forwards(layer, 5)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert live_forwards(resumed, 16) == [False] * 15 + [True]


@pytest.mark.parametrize("change", [copy.deepcopy, lambda layer: layer.double().float()])
def test_copies_and_moved_layers_go_on_counting(change) -> None:
    layer = conv(freeze=True, freeze_iter=2)
    live_forwards(layer, 2)
    assert live_forwards(change(layer), 3) == [True, False, False]


def test_frozen_layers_compute_no_statistics_and_pass_no_gradient_through_them() -> None:
    layer = conv(freeze=True, freeze_iter=1)
    live_forwards(layer, 2)
    x = images().requires_grad_()
    with mock.patch.object(layers_module, "sampled_moments", side_effect=AssertionError):
        output = layer(x)
    cotangent = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, x, cotangent)
    plain = layer.fuse()
    (expected,) = torch.autograd.grad(plain(x), x, cotangent)
    torch.testing.assert_close(grad, expected)


def test_start_corrected_running_values_are_weighted_means_of_all_batches() -> None:
    layer, plain = conv(start_corrected=True), conv()
    means = []
    for _ in range(4):
        x = images() + 1
        layer(x), plain(x)
        once = conv(momentum=1.0)
        once(x)
        means.append(once.running_mean)
    weights = torch.tensor([0.9**3, 0.9**2, 0.9, 1.0])
    expected = (torch.stack(means) * (weights / weights.sum())[:, None]).sum(0)
    torch.testing.assert_close(layer.running_mean, expected)
    assert plain.running_mean.norm() < 0.5 * expected.norm()


def test_start_correction_counts_live_forwards_only() -> None:
    freezing, plain = conv(start_corrected=True, freeze=True, freeze_iter=1), conv(start_corrected=True)
    for step in range(13):
        x = images()
        freezing(x)
        if step in (0, 1, 10, 11):
            plain(x)
    for name in ("running_mean", "running_deconv"):
        torch.testing.assert_close(getattr(freezing, name), getattr(plain, name))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (conv, (4, 3, 8, 8)),
        (lambda: DeconvLinear(6, 2), (9, 6)),
        (lambda: ChannelDeconv(6, cfg=DeconvCfg(block=4)), (9, 6)),
    ],
    ids=["conv", "linear", "channel"],
)
def test_non_finite_batches_leave_the_running_values_as_they_were(build, shape: tuple[int, ...], poison: float) -> None:
    layer, x = build(), torch.randn(shape)
    layer(x)
    assert not layer.saw_nonfinite
    before = {name: value.clone() for name, value in layer.named_buffers() if name.startswith("running")}
    x[0] = poison
    layer(x)
    for name, value in before.items():
        assert torch.equal(getattr(layer, name), value), name
    assert layer.saw_nonfinite
    assert "saw_nonfinite" not in layer.state_dict()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"freeze": True, "freeze_iter": 1}])
def test_activation_checkpointing_updates_statistics_once(use_reentrant: bool, options: dict) -> None:
    plain = conv(**options)
    checkpointed = copy.deepcopy(plain)
    for _ in range(4):  # over the step at which the layer freezes
        x = images().requires_grad_()
        y = x.detach().clone().requires_grad_()
        (plain(x) ** 2).sum().backward()
        (checkpoint(checkpointed, y, use_reentrant=use_reentrant) ** 2).sum().backward()
        torch.testing.assert_close(y.grad, x.grad)
    for (name, value), other in zip(plain.state_dict().items(), checkpointed.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, msg=name)
    torch.testing.assert_close(checkpointed.weight.grad, plain.weight.grad)


def evaluating() -> Deconv2d:
    layer = conv()
    layer(images())
    layer.eval()
    return layer


def optimise(layer: nn.Module, optimizer: type[torch.optim.Optimizer], **options) -> None:
    layer(images()).sum().backward()
    optimizer(layer.parameters(), 0.1, **options).step()


CHANGES = {
    "weight in place": lambda layer: layer.weight.detach().mul_(2),
    "bias in place": lambda layer: layer.bias.detach().add_(1),
    "buffer in place": lambda layer: layer.running_deconv.mul_(2),
    "mean in place": lambda layer: layer.running_mean.add_(1),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "another storage": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "through data": lambda layer: layer.weight.data.mul_(2),
    "buffer through data": lambda layer: layer.running_deconv.data.mul_(2),
    "memory, as collectives do": lambda layer: layer.weight.detach().numpy().__imul__(2),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "assigned state dict": lambda layer: layer.load_state_dict(conv().state_dict(), assign=True),
    "an optimiser step": lambda layer: optimise(layer, torch.optim.SGD),
    "fused SGD": lambda layer: optimise(layer, torch.optim.SGD, fused=True),
    "fused AdamW": lambda layer: optimise(layer, torch.optim.AdamW, fused=True),
    "a training forward": lambda layer: (layer.train()(images()), layer.eval()),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_evaluation_uses_the_present_weights_whoever_wrote_them(change, mode) -> None:
    layer, x = evaluating(), images()
    with mode():
        before = layer(x).clone(), layer(x).clone()
    assert torch.equal(*before)
    change(layer)
    with mode():
        after = layer(x)
    assert not torch.equal(after, before[0])
    with torch.no_grad():
        fresh = copy.deepcopy(layer).fuse()(x)
    torch.testing.assert_close(after.detach(), fresh, rtol=1e-5, atol=1e-6)


def test_training_in_evaluation_mode_evaluates_what_a_fused_optimiser_wrote() -> None:
    layers = [evaluating() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, fused in zip(layers, (False, True), strict=True):
        optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=fused)
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            layer(images()).square().mean().backward()
            optimizer.step()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(layers[1](x), layers[0](x), rtol=1e-4, atol=1e-5)


def test_an_averaged_teacher_that_is_written_through_data_follows_its_student() -> None:
    student = evaluating()
    teacher = copy.deepcopy(student).requires_grad_(False)
    x = images()
    teacher(x)
    for mine, others in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.data.lerp_(2 * others.data, 0.5)
    torch.testing.assert_close(teacher(x), 1.5 * student(x).detach(), rtol=1e-4, atol=1e-5)


def test_evaluation_lets_gradients_reach_the_weight_again_and_again() -> None:
    layer, x = evaluating(), images()
    for _ in range(2):
        layer.zero_grad()
        layer(x).sum().backward()
        assert layer.weight.grad.abs().sum() > 0


def test_evaluation_under_inference_mode_leaves_nothing_that_autograd_could_not_use() -> None:
    layer = evaluating().requires_grad_(False)
    with torch.inference_mode():
        layer(images())
    x = images().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_inference_tensors_and_functional_calls_are_evaluated() -> None:
    with torch.inference_mode():
        assert evaluating()(images()).isfinite().all()
    layer, x = evaluating(), images()
    with torch.no_grad():
        expected = layer(x)
        doubled = {name: 2 * value for name, value in layer.named_parameters()}
        output = torch.func.functional_call(layer, doubled, (x,))
        torch.testing.assert_close(output, 2 * expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x), expected)
        stacked = {name: torch.stack([value, 2 * value]) for name, value in layer.named_parameters()}
        both = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(stacked)
        torch.testing.assert_close(both[1], 2 * both[0], rtol=1e-4, atol=1e-5)


BUILDS = {
    "conv": (conv, (4, 3, 8, 8)),
    "fast conv": (lambda: Deconv2d(3, 4, 3, cfg="fast"), (4, 3, 8, 8)),
    "depthwise": (lambda: Deconv2d(3, 3, 3, groups=3, cfg="fast"), (4, 3, 8, 8)),
    "linear": (lambda: DeconvLinear(6, 2), (9, 6)),
    "channel": (lambda: ChannelDeconv(6, cfg={"block": 4}), (9, 6)),
}
BY_KIND = {"argvalues": BUILDS.values(), "ids": BUILDS.keys()}


@pytest.mark.parametrize(("build", "shape"), **BY_KIND)
@pytest.mark.filterwarnings("ignore:whitening layers have frozen parameters")
def test_requires_grad_changes_no_number(build, shape) -> None:
    layer = build()
    other = copy.deepcopy(layer).requires_grad_(False)
    for _ in range(3):
        x = torch.randn(shape)
        assert torch.equal(layer(x).detach(), other(x))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_layer_of_frozen_parameters_and_live_statistics_says_so_once() -> None:
    network = nn.Sequential(conv(), Deconv2d(4, 4, 1)).requires_grad_(False)
    share_notices(network)
    with pytest.warns(UserWarning, match=r"requires_grad does not stop: timm_deconv.freeze\(model\)") as said:
        network(images())
        network(images())
        copy.deepcopy(network)(images())
    assert len(said) == 1 and "\n" not in str(said[0].message)


@pytest.mark.parametrize(("build", "shape"), **BY_KIND)
def test_frozen_statistics_are_a_state_that_is_shown_and_copied(build, shape) -> None:
    layer = build()
    layer(torch.randn(shape))
    layer.statistics_frozen = True
    assert "statistics frozen" in repr(layer)
    x, before = torch.randn(shape), {name: value.clone() for name, value in layer.state_dict().items()}
    for frozen in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        output = frozen(x)
        torch.testing.assert_close(output, frozen.eval()(x))
        frozen.train()
        for name, value in before.items():
            assert torch.equal(frozen.state_dict()[name], value), name
    layer.statistics_frozen = False
    layer(x)
    assert not torch.equal(layer.running_deconv, before["running_deconv"])


def test_a_state_dict_without_a_counter_is_one_of_many_batches() -> None:
    layer = conv(start_corrected=True)
    layer(images() + 10)
    state = {name: value for name, value in layer.state_dict().items() if name != "num_batches_tracked"}
    loaded = conv(start_corrected=True)
    loaded.load_state_dict(state)
    loaded(torch.zeros(4, 3, 8, 8))
    torch.testing.assert_close(loaded.running_mean, 0.9 * layer.running_mean)
    published = conv(freeze=True, freeze_iter=2)
    published.load_state_dict(state)
    assert live_forwards(published, 5) == [True, True, True, False, False]


def test_a_state_dict_without_the_gain_loads_as_it_is_and_one_with_it_anywhere() -> None:
    fast, paper = (Deconv2d(3, 4, 3, cfg=cfg) for cfg in ("fast", {"preset": "fast", "gain_corrected": False}))
    for _ in range(3):
        paper(images()), fast(images())
    fast.load_state_dict(paper.state_dict())
    x = images()
    torch.testing.assert_close(fast.eval()(x), paper.eval()(x))
    fast.train()(images())
    paper.load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast.eval()(x), paper.eval()(x))


@pytest.mark.parametrize(("build", "shape"), **BY_KIND)
def test_layers_made_on_no_device_load_and_train(build, shape) -> None:
    source = build()
    source(torch.randn(shape))
    with torch.device("meta"):
        layer = build()
    layer.load_state_dict(source.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    layer.to("cpu")
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), source(x))
    assert not layer.saw_nonfinite


@pytest.mark.parametrize(("build", "shape"), **BY_KIND)
def test_reset_parameters_forgets_all_batches_even_of_uninitialised_memory(build, shape) -> None:
    fresh = build()
    with torch.device("meta"):
        layer = build()
    layer.to_empty(device="cpu")
    for buffer in layer.buffers():
        buffer.fill_(7)
    layer.reset_parameters()
    for name, value in fresh.named_buffers():
        assert torch.equal(layer.get_buffer(name), value), name


def test_averaged_models_take_our_buffers() -> None:
    network = nn.Sequential(Deconv2d(3, 4, 3, cfg="fast"), nn.Flatten(), DeconvLinear(144, 2, cfg="fast"))
    average = torch.optim.swa_utils.AveragedModel(network, use_buffers=True)
    for _ in range(2):
        network(images())
        average.update_parameters(network)
    assert all(value.isfinite().all() for value in average.module.state_dict().values())


def test_a_counter_written_by_others_is_read_again_after_train() -> None:
    layer = conv(freeze=True, freeze_iter=2)
    layer(images())
    layer.num_batches_tracked.data.fill_(50)  # as a broadcast does, which leaves no trace in the version
    assert live_forwards(layer.train(), 2) == [False, False]


@pytest.mark.parametrize("with_buffers", [False, True])
@pytest.mark.parametrize("dropped", [(), ("num_batches_tracked", "running_gain", "running_power")])
def test_accelerate_loads_into_networks_made_empty(with_buffers: bool, dropped: tuple, tmp_path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Deconv2d(3, 4, 3, cfg="fast"), nn.Flatten(), DeconvLinear(144, 2, cfg="fast"))

    source = build()
    source(images())
    state = {name: value for name, value in source.state_dict().items() if not name.endswith(dropped or "none")}
    save_file(state, tmp_path / "model.safetensors")
    if with_buffers and dropped:
        pytest.skip("what neither the file nor the network has, accelerate cannot make up")
    with init_empty_weights(include_buffers=with_buffers):
        network = build()
    load_checkpoint_and_dispatch(network, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    x = images()
    torch.testing.assert_close(network.eval()(x), source.eval()(x))
