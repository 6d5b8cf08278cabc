"""A tape does what the function did that was watched, on other tensors; what cannot be replayed runs as it is.

Launches by a tape reach the interpreter: what Triton compiled is played by an object that is launched by addresses.
"""

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.gpu_path import on_gpu_path
from tests.kernels.gpu.poison import poisoned_memory
from timm_deconv.kernels import plain_form, replay, replayed
from timm_deconv.kernels.gpu import folding, launch, moments, roots, tape, tracking
from timm_deconv.kernels.gpu.launch import Launch
from timm_deconv.kernels.gpu.probe import _add_one, add_one
from timm_deconv.kernels.gpu.tape import Tape
from timm_deconv.layers import Deconv2d, DeconvLinear


class Compiled:
    """What a launch was compiled to, for tensors like those given."""

    function = packed_metadata = None

    def __init__(self, launch: Launch, tensors: tuple[Tensor | None, ...]) -> None:
        self.launch = launch
        self.like = [None if each is None else (each.dtype, _bytes_from(each)) for each in tensors]

    def run(self, *args: Any) -> None:
        pointers = args[9 : 9 + len(self.like)]
        tensors = [like and _tensor_at(pointer, *like) for pointer, like in zip(pointers, self.like, strict=True)]
        with _disable_current_modes():  # the interpreter copies, a GPU does not
            self.launch.kernel[self.launch.grid](*tensors, *self.launch.numbers, **self.launch.constants)


def _bytes_from(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage.nbytes() + storage.data_ptr() - tensor.data_ptr()


def _tensor_at(pointer: int, dtype: torch.dtype, length: int) -> Tensor:
    if not length:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * length).from_address(pointer), dtype=dtype)


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """The tapes that are played, on a path of GPUs that ends in the interpreter."""
    monkeypatch.setattr(replay, "_tapes", {})
    _forget_plans()
    by_triton = Launch._launch_by_triton

    def launch_by_triton(self: Launch, tensors: Any) -> Compiled:
        with _disable_current_modes():
            by_triton(self, tensors)
        return Compiled(self, tensors)

    monkeypatch.setattr(Launch, "_launch_by_triton", launch_by_triton)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0))
    for module in (launch, tape):
        monkeypatch.setattr(module, "driver", driver)
    found: list[Tape] = []
    with on_gpu_path(launches=True):
        play = Tape.play

        def listed(self: Tape, tensors: Any) -> Any:
            results = play(self, tensors)
            if results is not None:
                found.append(self)
            return results

        monkeypatch.setattr(Tape, "play", listed)
        yield found
    _forget_plans()


def _forget_plans() -> None:
    """Let no launch remember what it was compiled to."""
    for module in (folding, moments, roots, tracking):
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()


LAYERS = {
    "spatial": lambda: Deconv2d(16, 16, 3, padding=1, cfg="fast"),
    "without bias": lambda: Deconv2d(16, 8, 3, padding=1, bias=False, cfg="fast"),
    "pointwise, strided": lambda: Deconv2d(32, 16, 1, stride=2, cfg="fast"),
    "tiles": lambda: Deconv2d(80, 8, 1, cfg="fast"),
    "depthwise": lambda: Deconv2d(16, 16, 3, padding=1, groups=16, cfg="fast"),
    "grouped": lambda: Deconv2d(32, 32, 3, padding=1, groups=2, cfg="fast"),
    "linear": lambda: DeconvLinear(32, 10, cfg="fast"),
    "no gain": lambda: Deconv2d(16, 16, 1, cfg={"preset": "fast", "gain_corrected": False}),
}


def step(layer: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """What a training step makes of a layer's input: output, gradients and buffers."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(cotangent)
    grads = {name: each.grad for name, each in layer.named_parameters()}
    buffers = {name: each.clone() for name, each in layer.named_buffers()}
    return {"output": output.detach(), "x": x.grad, **grads, **buffers, "nonfinite": layer.saw_nonfinite.clone()}


def formatted(values: Tensor, format: torch.memory_format) -> Tensor:
    return values.to(memory_format=format) if values.ndim == 4 else values


CONTIGUOUS = ("spatial", "pointwise, strided", "depthwise")


@pytest.mark.parametrize(
    ("build", "format"),
    [(build, torch.channels_last) for build in LAYERS.values()]
    + [(LAYERS[name], torch.contiguous_format) for name in CONTIGUOUS],
    ids=[*LAYERS, *(f"{name}, contiguous" for name in CONTIGUOUS)],
)
def test_steps_that_are_replayed_are_those_of_the_plain_form(
    build: Callable[[], nn.Module], format: torch.memory_format, played: list[Tape]
) -> None:
    torch.manual_seed(0)
    layer, other = build(), build()
    shape = (24, layer.in_features) if isinstance(layer, nn.Linear) else (4, layer.in_channels, 8, 8)
    exact = build().double()
    for each in (exact, other):
        each.load_state_dict(layer.state_dict())
    for number in range(3):
        x = formatted(torch.randn(shape) + number, format)
        with plain_form():
            cotangent = formatted(torch.randn(exact(x.double()).shape), format)
            exact.load_state_dict(other.state_dict())
            expected = step(exact, x.double(), cotangent.double())
        del played[:]
        with poisoned_memory():
            found = step(layer, x, cotangent)
        other.load_state_dict(layer.state_dict())
        assert len(played) == (0 if number == 0 else 2)
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value.double(), rtol=2e-4, atol=2e-4, msg=name)


def test_batches_that_are_not_finite_leave_the_averages_alone_when_replayed(played: list[Tape]) -> None:
    layer, x = LAYERS["spatial"](), torch.randn(4, 16, 8, 8)
    cotangent = torch.ones(4, 16, 8, 8)
    for _ in range(2):
        before = step(layer, x, cotangent)
    after = step(layer, x.index_fill(0, torch.tensor(1), torch.nan), cotangent)
    assert len(played) == 4 and bool(after["nonfinite"]) and not bool(before["nonfinite"])
    assert torch.equal(after["running_deconv"], before["running_deconv"]) and after["num_batches_tracked"] == 3


def test_repeated_forwards_are_not_taken_for_first_ones(played: list[Tape]) -> None:
    layer, x = LAYERS["spatial"](), torch.randn(4, 16, 8, 8, requires_grad=True)
    for number in range(3):
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert layer.num_batches_tracked == number + 1 and len(played) == 3 * number


def test_other_tensors_are_written_and_their_versions_told(played: list[Tape]) -> None:
    numbers = [torch.zeros(()) for _ in range(3)]
    for number in numbers:
        before = number._version
        (result,) = replayed(lambda number=number: watched_addition(number), [number], "addition")
        assert number == 1 and number._version > before and result.shape == ()
    assert len(played) == 2


def watched_addition(number: Tensor) -> list[Tensor]:
    """Add one to a number as an operation does, which raises its version."""
    add_one(number)
    torch.autograd.graph.increment_version(number)
    return [torch.empty_like(number)]


def test_settings_types_and_strides_have_tapes_of_their_own(played: list[Tape]) -> None:
    a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    for tensor, setting in ((a, 1), (a, 2), (a.half(), 1), (a.T, 1), (a[:2], 1)):
        replayed(lambda tensor=tensor: watched_addition(tensor), [tensor], setting)
    assert not played and len(replay._tapes) == 5
    replayed(lambda: watched_addition(b), [b], 2)
    assert len(played) == 1 and b[0, 0] == 1


def copies(number: Tensor) -> list[Tensor]:
    add_one(number)
    return [number.clone()]


def writes_elsewhere(number: Tensor) -> list[Tensor]:
    Launch(_add_one, (1,))(ELSEWHERE)
    return [torch.empty_like(number)]


def returns_what_it_was_given(number: Tensor) -> list[Tensor]:
    add_one(number)
    return [number]


ELSEWHERE = torch.zeros(())


@pytest.mark.parametrize("function", [copies, writes_elsewhere, returns_what_it_was_given])
def test_a_function_that_does_more_runs_as_it_is(function: Callable[[Tensor], Any], played: list[Tape]) -> None:
    calls = []
    for _ in range(3):
        number = torch.zeros(())
        replayed(lambda number=number: calls.append(1) or function(number), [number])
    assert len(calls) == 3 and not played


def test_tensors_that_share_memory_run_as_they_are(played: list[Tape]) -> None:
    for _ in range(3):
        numbers = torch.zeros(8)
        replayed(lambda numbers=numbers: watched_addition(numbers[:4]), [numbers[:4], numbers[2:6]])
        assert numbers[0] == 1
    assert not played


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_what_somebody_looks_at_or_lies_elsewhere_runs_as_it_is(
    played: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def run(number: Tensor) -> None:
        replayed(lambda: calls.append(1) or watched_addition(number), [number])

    run(torch.zeros(4))
    run(torch.zeros(5)[1:])
    with _Mode():
        run(torch.zeros(4))
    with plain_form():
        run(torch.zeros(4))
    hook = triton.knobs.HookChain()
    hook.add(lambda metadata: None)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
    run(torch.zeros(4))
    assert len(calls) == 5 and not played
