"""Peak memory, on examples that can be counted by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.memory import COLUMNS, MemorySettings, memory_rows, peak_bytes
from timm_deconv.errors import InputError

KIB = 1024
SMALL = MemorySettings(width=0.125, batch=4, forms=("none", "twin", "deconv"), presets=("fast",))


def floats(kibibytes: int) -> Tensor:
    return torch.ones(kibibytes * KIB // 4)


class Doubled(torch.autograd.Function):
    """Keeps one tensor of its input's size, drops another; two more on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dropped = x * 2
        kept = dropped * 2
        del dropped
        ctx.save_for_backward(kept)
        return kept + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        product = grad * kept
        return product + product


def test_what_is_freed_meanwhile_does_not_count() -> None:
    def step() -> None:
        a = floats(1)
        b = a + 1  # 2 KiB
        del a
        view = b.view(2, -1)[0]
        del b  # the view keeps it: 1 KiB
        floats(5)  # 6 KiB, gone at once
        floats(4)  # 5 KiB
        del view

    assert peak_bytes(step) == 6 * KIB


def test_what_is_there_before_does_not_count_nor_does_writing_to_it() -> None:
    layer, x = nn.Linear(16, 16), floats(8)

    def step() -> None:
        x.mul_(2)
        with torch.no_grad():
            layer.weight.add_(1)
        x.add_(floats(8))

    assert peak_bytes(step) == 8 * KIB


def test_autograd_functions_and_backward_passes_are_looked_into() -> None:
    x = floats(4).requires_grad_()

    def step() -> None:
        y = Doubled.apply(x)
        y.sum().backward()

    # y, the kept tensor, the product and the gradient of x; the sum and its gradient are one float each
    assert peak_bytes(step) == 4 * 4 * KIB + 8
    assert x.grad is not None and torch.equal(x.grad, 8 * torch.ones_like(x))


def test_rows_compare_with_the_network_without_norms() -> None:
    rows = memory_rows(SMALL, lambda message: None)
    assert [set(row) for row in rows] == [set(COLUMNS)] * 3
    assert [(row["form"], row["preset"]) for row in rows] == [("none", ""), ("twin", ""), ("deconv", "fast")]
    none, twin, deconv = rows
    assert none["ratio_to_none"] == 1
    assert twin["ratio_to_none"] == pytest.approx(twin["peak_bytes"] / none["peak_bytes"], rel=1e-3)
    assert twin["ratio_to_none"] > 1 and deconv["ratio_to_none"] > 1
    model = SMALL.build("none")
    assert none["state_bytes"] == sum(4 * parameter.numel() for parameter in model.parameters())
    assert none["peak_bytes"] > none["state_bytes"]  # all gradients, and activations


def test_peak_grows_by_what_a_network_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    original = MemorySettings.build

    class Keeper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.default_cfg, self.num_classes = model, model.default_cfg, model.num_classes

        def forward(self, x: Tensor) -> Tensor:
            self.kept = floats(3000)
            return self.model(x)

    settings = MemorySettings(width=0.125, batch=4, forms=("none",))
    (plain,) = memory_rows(settings, lambda message: None)
    monkeypatch.setattr(MemorySettings, "build", lambda *args, **kwargs: Keeper(original(*args, **kwargs)))
    monkeypatch.setattr(memory, "check_training", lambda label, model, loss: setattr(model, "kept", None))
    (keeping,) = memory_rows(settings, lambda message: None)
    assert keeping["peak_bytes"] - plain["peak_bytes"] == 3000 * KIB


def test_each_preset_is_a_row_and_an_unknown_one_is_refused() -> None:
    assert list(MemorySettings().networks()) == [
        ("none", ""),
        ("twin", ""),
        ("deconv", "fast"),
        ("deconv", "paper"),
        ("published", "paper"),
    ]
    with pytest.raises(InputError, match="no preset 'fasst'; nearest: fast"):
        MemorySettings(presets=("fasst",))
