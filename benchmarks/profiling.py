"""Where the time of a training step goes: the operations of the forms of one network, by torch's profiler."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .memory import MemorySettings, checked_step
from .rows import CONDITIONS, Row, rounded
from .step import Step

__all__ = ["COLUMNS", "OTHER", "SHOWN", "ProfileSettings", "kernel_seconds", "operation_seconds", "profile_rows"]

COLUMNS = [
    *"network width form preset memory_format batch image_size amp operation calls milliseconds".split(),
    *CONDITIONS,
]

SHOWN = "form preset memory_format operation calls milliseconds".split()

LEAST_SHARE = 0.01
"""An operation that takes less of the step is counted among the others."""

OTHER = "other operations"


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(MemorySettings):
    """What is profiled, see `MemorySettings`: the mean of `steps` training steps, after one that is not.

    The defaults show a step before, by the published operation sequence, and after.
    """

    presets: Sequence[str] = ("fast",)
    steps: int = 3


def profile_rows(settings: ProfileSettings, progress: Callable[[str], object] = print) -> list[Row]:
    """Measure a row for each form and operation, an operation's time without that of those that it calls.

    Raises:
        RuntimeError, NonFiniteError: a network does not compute what it should.
    """
    rows = []
    for memory_format in settings.memory_formats:
        for form, name in settings.networks():
            progress(" ".join(filter(None, (form, name, memory_format))))
            _, step = checked_step(form, name, memory_format, settings)
            shared = settings.described() | {"form": form, "preset": name, "memory_format": memory_format}
            for operation, (calls, seconds) in _largest(operation_seconds(step, settings)).items():
                found = {"operation": operation, "calls": round(calls), "milliseconds": rounded(1e3 * seconds)}
                rows.append(shared | found)
    return rows


def operation_seconds(step: Step, settings: ProfileSettings) -> dict[str, tuple[float, float]]:
    """Measure calls and seconds of each operation in a step (on CUDA of its kernels), means of `settings.steps`."""
    on_device = torch.device(settings.device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(settings.steps):
            step()
    return {
        event.key: (event.count / settings.steps, _microseconds(event, on_device) / settings.steps / 1e6)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU  # kernels, listed too, are in the time of what launches them
    }


def kernel_seconds(step: Step, steps: int = 3) -> dict[str, tuple[float, float]]:
    """Measure launches and seconds of each kernel, copy and fill that a GPU does in a step, means of `steps`."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return {
        event.key: (event.count / steps, event.self_device_time_total / steps / 1e6)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    }


def _microseconds(event: torch.autograd.profiler_util.FunctionEventAvg, on_device: bool) -> float:
    return event.self_device_time_total if on_device else event.self_cpu_time_total


def _largest(operations: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Sort the operations of at least LEAST_SHARE, the longest first, and sum up the others."""
    least = LEAST_SHARE * sum(seconds for _, seconds in operations.values())
    total_seconds: Counter[str] = Counter()
    total_calls: Counter[str] = Counter()
    for operation, (calls, seconds) in operations.items():
        key = operation if seconds >= least else OTHER
        total_seconds[key] += seconds
        total_calls[key] += calls
    return {key: (total_calls[key], seconds) for key, seconds in total_seconds.most_common()}
