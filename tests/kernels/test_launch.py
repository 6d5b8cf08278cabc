"""What was compiled is launched again with what it was first launched with, without asking Triton."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu_path import driver_without_gpu

triton = pytest.importorskip("triton")

from tests.kernels.launched import some_kernel  # noqa: E402
from timm_deconv.kernels.gpu.launch import launch  # noqa: E402

A, B = torch.zeros(64), torch.zeros(64)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What reaches the driver, of a GPU that is not there."""
    found: list[tuple[Any, ...]] = []

    def launcher(driver: object, source: Any, metadata: Any) -> Any:
        return lambda *args: found.append((*args[:3], metadata.num_warps, source.signature, *args[9:]))

    monkeypatch.setattr("benchmarks.gpu_path._Driver.launcher_cls", launcher)
    monkeypatch.setattr("timm_deconv.kernels.gpu.launch._compiled", {})
    some_kernel.device_caches.clear()
    with driver_without_gpu():
        yield found


CALLS = {
    "as it was": ((A, B, 7, 0.5, None), {}),
    "a multiple of 16": ((A, B, 32, 0.5, None), {}),
    "one": ((A, B, 1, 0.5, None), {}),
    "a large number": ((A, B, 2**40 + 1, 0.5, None), {}),
    "one more tensor": ((A, B, 7, 0.5, A), {}),
    "another type": ((A.half(), B, 7, 0.5, None), {}),
    "not aligned": ((A[1:], B, 7, 0.5, None), {}),
    "another constant": ((A, B, 7, 0.5, None), {"TWICE": False}),
    "more warps": ((A, B, 7, 0.5, None), {"warps": 8}),
}


def test_every_launch_reaches_the_driver_as_by_triton_alone(launched: list[tuple[Any, ...]]) -> None:
    for _ in range(3):
        for args, options in CALLS.values():
            constants = {"WIDTH": 16, "TWICE": True} | {k: v for k, v in options.items() if k != "warps"}
            launch(some_kernel, (4, 2), *args, warps=options.get("warps", 4), **constants)
            warps = options.get("warps", 4)
            some_kernel[(4, 2)](*args, **constants, num_warps=warps, num_stages=2)
            ours, tritons = launched[-2:]
            assert ours[:5] == tritons[:5]
            assert all(one is other or one == other for one, other in zip(ours[5:], tritons[5:], strict=True))
    assert len(launched) == 6 * len(CALLS)


def test_what_is_the_same_to_triton_is_compiled_once(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = type(some_kernel).run
    monkeypatch.setattr(type(some_kernel), "run", lambda *a, **k: asked.append(1) or original(*a, **k))
    for number in (7, 9, 3, 7):
        launch(some_kernel, (number,), A, B, number, 0.25 * number, None, WIDTH=16, TWICE=True)
    assert len(asked) == 1
    assert [(*args[:3], args[7], args[8]) for args in launched] == [
        (number, 1, 1, number, 0.25 * number) for number in (7, 9, 3, 7)
    ]
