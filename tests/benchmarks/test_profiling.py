"""Operations of a step are counted and timed, on examples that can be counted by hand."""

import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import profiling
from benchmarks.profiling import (
    COLUMNS,
    OTHER,
    ProfileSettings,
    kernel_seconds,
    operation_seconds,
    profile_rows,
)
from benchmarks.rows import Row


@pytest.fixture(scope="module")
def profiled() -> list[Row]:
    """Rows of a small network in two forms."""
    return profile_rows(ProfileSettings(width=0.125, batch=4, forms=("none", "deconv")), lambda message: None)


def test_calls_and_seconds_are_those_of_a_step() -> None:
    x = torch.randn(400, 400)

    def step() -> torch.Tensor:
        return (x @ x @ x).sin()

    step()
    started = time.perf_counter()
    found = operation_seconds(step, ProfileSettings(steps=4))
    elapsed = time.perf_counter() - started
    assert found["aten::mm"][0] == 2 and found["aten::sin"][0] == 1
    assert 0 < sum(seconds for _, seconds in found.values()) * 4 <= elapsed
    assert found["aten::mm"][1] > found["aten::matmul"][1]  # which calls it, and has next to no time of its own


def test_rows_are_the_operations_of_each_form(profiled: list[Row]) -> None:
    rows = profiled
    assert all(set(row) == set(COLUMNS) for row in rows)
    by_form = {form: {row["operation"]: row for row in rows if row["form"] == form} for form in ("none", "deconv")}
    assert by_form["none"]["aten::convolution_backward"]["calls"] == 20  # the convolutions of ResNet-18
    assert "_WhitenedConvBackward" in by_form["deconv"] and "_WhitenedConvBackward" not in by_form["none"]
    assert {row["preset"] for row in by_form["deconv"].values()} == {"fast"}


@pytest.fixture
def events_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a profiler would tell of a product on a GPU, within a region that has a name."""

    def event(key: str, device_type: DeviceType, named: bool = False) -> SimpleNamespace:
        time = {"count": 2, "self_device_time_total": 100.0}
        return SimpleNamespace(key=key, device_type=device_type, is_user_annotation=named, **time)

    events = [event("aten::mm", DeviceType.CPU), event("sgemm", DeviceType.CUDA), event("step", DeviceType.CUDA, True)]
    profiler = MagicMock()
    profiler.return_value.__enter__.return_value.key_averages.return_value = events
    monkeypatch.setattr(profiling, "profile", profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("events_of_a_gpu")
def test_a_kernels_time_counts_once() -> None:
    found = operation_seconds(lambda: torch.zeros(()), ProfileSettings(device="cuda", steps=2))
    assert found == {"aten::mm": (1.0, 50e-6)}


@pytest.mark.usefixtures("events_of_a_gpu")
def test_kernels_are_what_the_gpu_did() -> None:
    assert kernel_seconds(lambda: torch.zeros(()), steps=2) == {"sgemm": (1.0, 50e-6)}


def test_short_operations_are_summed_up(profiled: list[Row]) -> None:
    rows = [row for row in profiled if row["form"] == "none"]
    total = sum(row["milliseconds"] for row in rows)
    for row in rows:
        assert row["operation"] == OTHER or row["milliseconds"] >= 0.0099 * total
    assert next(row["calls"] for row in rows if row["operation"] == OTHER) > 100
