"""Peak memory of one training step of the forms of one network."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from timm_deconv.layers import preset

from .rows import CONDITIONS, Row, rounded
from .step import MEMORY_FORMATS, Step, StepSettings, check_training, random_batch, training_step

__all__ = ["COLUMNS", "SHOWN", "MemorySettings", "checked_step", "memory_rows", "peak_bytes"]

COLUMNS = [
    *"network width form preset memory_format batch image_size amp state_bytes peak_bytes ratio_to_none".split(),
    *CONDITIONS,
]

SHOWN = "form preset memory_format state_bytes peak_bytes ratio_to_none".split()


@dataclass(frozen=True, kw_only=True)
class MemorySettings(StepSettings):
    """What is measured: `StepSettings`, the form 'deconv' once with each of `presets`; timing settings play no part.

    Raises:
        InputError: a form, memory format or preset that is not known.
    """

    presets: Sequence[str] = ("fast", "paper")
    memory_formats: Sequence[str] = ("channels_last",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.presets:
            preset(name)

    def networks(self) -> Iterator[tuple[str, str]]:
        """Yield the forms, each with its preset or ''."""
        for form in self.forms:
            presets = {"deconv": self.presets, "published": ("paper",)}.get(form, ("",))
            yield from ((form, name) for name in presets)


def memory_rows(settings: MemorySettings, progress: Callable[[str], object] = print) -> list[Row]:
    """Measure a row for each form, preset and memory format.

    `peak_bytes` is what one training step (forward pass, loss, backward pass) has alive at most beyond what is there
    before, see `peak_bytes`: gradients of parameters count, `state_bytes` (parameters and buffers) and the batch do
    not. `ratio_to_none` compares `peak_bytes` with that of the network without norms.

    Raises:
        RuntimeError, NonFiniteError: a network does not compute what it should.
    """
    rows: list[Row] = []
    for memory_format in settings.memory_formats:
        measured = {}
        for form, name in settings.networks():
            progress(" ".join(filter(None, (form, name, memory_format))))
            measured[form, name] = _measure(form, name, memory_format, settings)
        none = measured.get(("none", ""))
        for (form, name), (state, peak) in measured.items():
            found = {"state_bytes": state, "peak_bytes": peak, "ratio_to_none": rounded(peak / none[1]) if none else ""}
            network = {"form": form, "preset": name, "memory_format": memory_format}
            rows.append(settings.described() | network | found)
    return rows


def checked_step(form: str, preset: str, memory_format: str, settings: StepSettings) -> tuple[torch.nn.Module, Step]:
    """Build a network and its training step, which is taken once: the device is ready, and what it computes is checked.

    Args:
        form: of `networks.FORMS`.
        preset: of the form 'deconv', else ''.
        memory_format: of MEMORY_FORMATS.
        settings: network and sizes.

    Raises:
        RuntimeError, NonFiniteError: the network does not compute what it should.
    """
    model = settings.build(form, preset or None).to(memory_format=MEMORY_FORMATS[memory_format])
    step = training_step(model, *random_batch(settings, model, memory_format), settings)
    check_training(" ".join(filter(None, (form, preset, memory_format))), model, step())
    return model, step


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Measure how many bytes a step has allocated at once, at most, beyond what is there before it.

    On a CPU every tensor that torch allocates is counted, as its profiler reports it, inside autograd functions,
    kernels and backward passes too. On CUDA it is what the allocator counts.
    """
    if torch.device(device).type == "cuda":
        return _peak_of_allocator(step, torch.device(device))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"), key=lambda pair: pair[0]
    )
    return max(itertools.accumulate(change for _, change in changes))


def _peak_of_allocator(step: Step, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _measure(form: str, name: str, memory_format: str, settings: MemorySettings) -> tuple[int, int]:
    """Measure bytes of parameters and buffers, and at the peak of a step."""
    model, step = checked_step(form, name, memory_format, settings)
    model.zero_grad(set_to_none=True)
    state = sum(t.nbytes for tensors in (model.parameters(), model.buffers()) for t in tensors)
    return state, peak_bytes(step, settings.device)
