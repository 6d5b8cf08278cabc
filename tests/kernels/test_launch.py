"""What was compiled is launched again with what it was first launched with, without asking Triton."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu_path import driver_without_gpu

triton = pytest.importorskip("triton")

from tests.kernels.launched import some_kernel  # noqa: E402
from timm_deconv.kernels.gpu.launch import Launch  # noqa: E402

A, B = torch.zeros(64), torch.zeros(64)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What reaches the driver, of a GPU that is not there."""
    found: list[tuple[Any, ...]] = []

    def launcher(driver: object, source: Any, metadata: Any) -> Any:
        return lambda *args: found.append((*args[:3], metadata.num_warps, source.signature, args[7], *args[9:]))

    monkeypatch.setattr("benchmarks.gpu_path._Driver.launcher_cls", launcher)
    some_kernel.device_caches.clear()
    with driver_without_gpu():
        yield found


TENSORS = {
    "as they were": (A, B, None),
    "one more": (A, B, A),
    "another type": (A.half(), B, None),
    "not aligned": (A[1:], B, None),
    "less aligned": (A[2:], B[1:], None),
}
NUMBERS = {"any": 7, "a multiple of 16": 32, "one": 1, "a large one": 2**40 + 1}
OPTIONS: dict[str, dict[str, Any]] = {"none": {}, "another constant": {"TWICE": False}, "more warps": {"warps": 8}}


def a_launch(number: int = 7, warps: int = 4, TWICE: bool = True) -> Launch:
    return Launch(some_kernel, (4, 2), number, 0.5, warps=warps, WIDTH=16, TWICE=TWICE)


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_launch_reaches_the_driver_as_by_triton_alone(
    number: int, options: dict[str, Any], launched: list[tuple[Any, ...]]
) -> None:
    launch, warps = a_launch(number, **options), options.get("warps", 4)
    constants = {"WIDTH": 16, "TWICE": options.get("TWICE", True)}
    for _ in range(3):
        for tensors in TENSORS.values():
            launch(*tensors)
            some_kernel[(4, 2)](*tensors, number, 0.5, **constants, num_warps=warps, num_stages=2)
            ours, tritons = launched[-2:]
            assert ours[:5] == tritons[:5]
            assert [pointer_of(value) for value in ours[6:]] == [pointer_of(value) for value in tritons[6:]]
    assert len(launched) == 6 * len(TENSORS)


def pointer_of(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def test_triton_is_asked_once_for_tensors_of_a_kind(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = type(some_kernel).run
    monkeypatch.setattr(type(some_kernel), "run", lambda *a, **k: asked.append(1) or original(*a, **k))
    launch = a_launch()
    for tensors in ((A, B), (A.clone(), B), (A, A)):
        launch(*tensors, None)
    assert len(asked) == 1 and len(launched) == 3


def test_profilers_see_launches_of_what_was_compiled_before(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, hook = a_launch(), triton.knobs.HookChain()
    launch(A, B, None)
    hook.add(lambda metadata: None)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
    launch(A, B, None)
    assert len(launched) == 2 and launched[-1][5] is hook
