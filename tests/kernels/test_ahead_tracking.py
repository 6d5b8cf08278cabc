"""Kernels that average a batch in compile for GPUs that are not here, within their limits, and are launched seldom."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.ahead import CLOSEST, Launched, check_resources, launches_of, on_gpus
from tests.kernels.tracked import a_batch, a_state
from timm_deconv.kernels import PIXEL, Averaging, Blocks, Window
from timm_deconv.kernels.gpu import tracking

FAST = Averaging(0.1, start_corrected=True)
STEM = Window((3, 3), (2, 2), (1, 1), (1, 1))

CASES: dict[str, tuple[Blocks, Window, int]] = {
    "27": (Blocks(1, 27, pixels=False), STEM, 1),
    "64": (Blocks(1, 64), PIXEL, 1),
    "four of 64": (Blocks(4, 64), PIXEL._replace(stride=(2, 2)), 1),
    "128": (Blocks(1, 128), PIXEL, 2),
    "256": (Blocks(1, 256), PIXEL, 2),
    "groups of 8": (Blocks(32, 8, groups=32), PIXEL, 2),
    "depthwise": (Blocks(960, 1, groups=960), PIXEL, 2),
    "depthwise, at most": (Blocks(4096, 1, groups=4096), PIXEL, 2),
}
of_cases = pytest.mark.parametrize(("blocks", "seen", "number"), CASES.values(), ids=CASES.keys())


def launches(
    blocks: Blocks,
    seen: Window,
    gained: bool,
    dtype: torch.dtype = torch.float32,
    averaging: Averaging = FAST,
    size: int = 16,
    memory_format: torch.memory_format = torch.channels_last,
) -> list[Launched]:
    """Return what is launched for images of a size and a dtype, which the buffers have too."""
    channels = blocks.number * blocks.features // (seen.kernel_size[0] * seen.kernel_size[1])
    batch: list[Any] = a_batch((2, channels, size, size), seen, blocks)
    batch[0] = batch[0].to(dtype, memory_format=memory_format)
    state = a_state(blocks, gained).to(dtype)
    return launches_of(lambda: tracking.average_in_(*state, *batch, averaging))


@pytest.mark.parametrize("gained", [False, True])
@of_cases
def test_one_set_of_one_tile_is_one_launch_and_others_are_two(
    blocks: Blocks, seen: Window, number: int, gained: bool
) -> None:
    assert len(launches(blocks, seen, gained)) == number


TYPED = [(name, dtype) for name in CASES if name != "128" for dtype in (torch.float32, torch.bfloat16)]


@on_gpus(
    TYPED,
    [("27", torch.float32), ("64", torch.bfloat16), ("256", torch.bfloat16), ("depthwise, at most", torch.float32)],
)
def test_every_kernel_fits_a_gpu_without_spilling(case: tuple[str, torch.dtype], capability: int) -> None:
    name, dtype = case
    blocks, seen, _ = CASES[name]
    for one in launches(blocks, seen, True, dtype):
        check_resources(one, capability)


@pytest.mark.parametrize("name", ["27", "64", "256", "depthwise"])
def test_images_whose_steps_are_no_multiples_of_sixteen_fit_too(name: str) -> None:
    blocks, seen, _ = CASES[name]
    for one in launches(blocks, seen, True, size=15, memory_format=torch.contiguous_format):
        check_resources(one, CLOSEST)


@pytest.mark.parametrize("name", ["64", "256", "depthwise"])
@pytest.mark.parametrize(
    "averaging", [FAST, Averaging(0.1, cumulative=True), FAST._replace(freeze_iter=100, recomputing=True)], ids=str
)
def test_kernels_without_a_gain_fit_too(averaging: Averaging, name: str) -> None:
    blocks, seen, _ = CASES[name]
    for one in launches(blocks, seen, False, averaging=averaging):
        check_resources(one, CLOSEST)


def test_limits_that_are_too_low_fail() -> None:
    for one in launches(*CASES["64"][:2], True):
        with pytest.raises(AssertionError, match="registers"):
            check_resources(one, 90, most_registers=40)
