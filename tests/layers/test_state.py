"""Freezing, running values, non-finite batches, recomputation, and the folded weight that evaluation keeps."""

import copy
import io
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timm_deconv.layers import ChannelDeconv, Deconv2d, DeconvCfg, DeconvLinear
from timm_deconv.layers import base as layers_base
from timm_deconv.layers import conv as layers_conv


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


def test_frozen_layers_thaw_in_cycles_as_published_or_never() -> None:
    cycle = [True] * 3 + [False] * 17
    assert live_forwards(conv(freeze=True, freeze_iter=2), 45) == (cycle * 3)[:45]
    assert live_forwards(conv(freeze=True, freeze_iter=2, thaw=False), 45) == [True] * 3 + [False] * 42


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
    with mock.patch.object(layers_conv, "batch_statistics", side_effect=AssertionError):
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
    layer = conv(start_corrected=True, freeze=True, freeze_iter=1)
    live_forwards(layer, 13)
    assert layer._updates(layer._forwards()) == layer._updates(layer.num_batches_tracked) == 4


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


def folds(layer: nn.Module, x: Tensor) -> int:
    """How often the weight is folded in one evaluating forward."""
    with mock.patch.object(layers_base, "fold", wraps=layers_base.fold) as counted, torch.no_grad():
        layer(x)
    return counted.call_count


def evaluating() -> Deconv2d:
    layer = conv()
    layer(images())
    layer.eval()
    return layer


CHANGES = {
    "weight in place": lambda layer: layer.weight.detach().mul_(2),
    "bias in place": lambda layer: layer.bias.detach().add_(1),
    "buffer in place": lambda layer: layer.running_deconv.mul_(2),
    "mean in place": lambda layer: layer.running_mean.add_(1),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "another storage": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "assigned state dict": lambda layer: layer.load_state_dict(conv().state_dict(), assign=True),
    "dtype there and back": lambda layer: layer.double().float(),
    "an optimiser step": lambda layer: step(layer),
    "a training forward": lambda layer: (layer.train()(images()), layer.eval()),
}


def step(layer: nn.Module) -> None:
    layer(images()).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_kept_fold_is_reused_and_never_stale(change) -> None:
    layer, x = evaluating(), images()
    assert [folds(layer, x), folds(layer, x), folds(layer, x)] == [1, 0, 0]
    change(layer)
    with torch.no_grad():
        kept = layer(x)
        assert not torch.equal(kept, evaluating()(x))
        torch.testing.assert_close(kept, layer.fuse()(x), rtol=1e-5, atol=1e-6)


def test_an_averaged_copy_does_not_see_the_original_fold() -> None:
    layer, x = evaluating(), images()
    with torch.no_grad():
        before = layer(x)
        average = copy.deepcopy(layer)
        assert average._kept is None
        for parameter in average.parameters():
            parameter.lerp_(torch.ones_like(parameter), 0.5)
        assert not torch.allclose(average(x), before)
        torch.testing.assert_close(layer(x), before)


def test_evaluation_lets_gradients_reach_the_weight_again_and_again() -> None:
    layer, x = evaluating(), images()
    with torch.no_grad():
        layer(x)
    for _ in range(2):
        layer.zero_grad()
        layer(x).sum().backward()
        assert layer.weight.grad.abs().sum() > 0


def test_a_fold_kept_under_inference_mode_serves_autograd_of_the_input() -> None:
    layer = evaluating().requires_grad_(False)
    with torch.inference_mode():
        layer(images())
    x = images().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_inference_tensors_and_functional_calls_are_evaluated_without_keeping() -> None:
    with torch.inference_mode():
        layer = evaluating()
        assert layer(images()).isfinite().all() and layer._kept is None
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
