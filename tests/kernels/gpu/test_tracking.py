"""Kernels that average a batch in, against the plain form in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poisoned_memory
from tests.kernels.tracked import State, a_batch, a_state
from timm_deconv.kernels import PIXEL, Averaging, Blocks, Window, average_in_
from timm_deconv.kernels.gpu import tracking as kernels
from timm_deconv.kernels.gpu.launch import Unfit
from timm_deconv.kernels.tracking import CYCLE

# Of the arrays that the interpreter computes with, where there are numbers that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

FAST = Averaging(0.1, start_corrected=True)
WINDOW = Window((3, 2), (2, 1), (1, 2), (1, 0))

CASES = {
    "a block": ((5, 24, 5, 6), PIXEL, Blocks(1, 24)),
    "blocks of five": ((9, 15, 5, 6), PIXEL, Blocks(3, 5)),
    "blocks of one": ((2, 7, 3, 4), PIXEL, Blocks(7, 1)),
    "64 features": ((2, 64, 9, 8), PIXEL, Blocks(1, 64)),
    "few rows": ((3, 36, 1, 1), PIXEL, Blocks(1, 36)),
    "one row": ((1, 5, 1, 1), PIXEL, Blocks(1, 5)),
    "strided pixels": ((3, 8, 7, 6), PIXEL._replace(stride=(2, 3)), Blocks(2, 4)),
    "interleaved pixels": ((3, 10, 5, 6), PIXEL, Blocks(2, 5, interleaved=True, pixels=False)),
    "two tiles": ((7, 96, 5, 4), PIXEL, Blocks(1, 96)),
    "three tiles and few rows": ((1, 147, 5, 4), PIXEL, Blocks(1, 147)),
    "two blocks of two tiles": ((1, 140, 9, 9), PIXEL, Blocks(2, 70)),
    "windows": ((2, 4, 7, 6), WINDOW, Blocks(1, 24, pixels=False)),
    "interleaved windows": ((2, 4, 7, 6), WINDOW, Blocks(2, 12, interleaved=True, pixels=False)),
    "blocks of windows": ((2, 4, 7, 6), WINDOW, Blocks(3, 8, pixels=False)),
    "windows of two tiles": ((1, 12, 6, 6), WINDOW, Blocks(1, 72, pixels=False)),
    "groups": ((3, 24, 5, 6), PIXEL, Blocks(3, 8, groups=3)),
    "groups of windows": ((2, 6, 7, 6), WINDOW, Blocks(2, 18, groups=2, pixels=False)),
    "groups of two tiles": ((2, 140, 3, 4), PIXEL, Blocks(2, 70, groups=2)),
    "depthwise": ((3, 70, 5, 6), PIXEL, Blocks(70, 1, groups=70)),
    "depthwise, few rows": ((2, 4, 1, 1), PIXEL, Blocks(4, 1, groups=4)),
}
FEW = {name: CASES[name] for name in ("a block", "two tiles", "groups of windows", "depthwise")}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "spaced": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    with poisoned_memory():
        yield


def check(state: State, batch: list[Any], averaging: Averaging) -> None:
    """Compare what the kernels write, and say, with what the plain form does in float64."""
    expected, moved = state.to(torch.float64), state.clone()
    args = [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in batch]
    said = average_in_.function(*expected, *args, averaging)
    assert torch.equal(kernels.average_in_(*moved, *batch, averaging), said)
    for found, exact in zip(moved.tensors(), expected.tensors(), strict=True):
        rounding = torch.finfo(found.dtype).eps if found.is_floating_point() else 0
        torch.testing.assert_close(found.to(exact.dtype), exact, rtol=max(rounding, 2e-5), atol=max(rounding, 2e-6))


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize(("shape", "seen", "blocks"), CASES.values(), ids=CASES.keys())
def test_averages_are_those_of_the_plain_form(
    shape: tuple[int, ...], seen: Window, blocks: Blocks, gained: bool
) -> None:
    check(a_state(blocks, gained), a_batch(shape, seen, blocks), FAST)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("shape", "seen", "blocks"), FEW.values(), ids=FEW.keys())
def test_images_may_lie_in_any_way(
    shape: tuple[int, ...], seen: Window, blocks: Blocks, layout: Callable[[Tensor], Tensor]
) -> None:
    batch = a_batch(shape, seen, blocks)
    batch[0] = layout(batch[0])
    batch[4] = batch[4][:1].expand_as(batch[4])
    check(a_state(blocks, True), batch, FAST)


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("forwards", [0, 1, 40])
@pytest.mark.parametrize(
    "averaging",
    [
        Averaging(0.1),
        Averaging(1.0, start_corrected=True),
        FAST,
        Averaging(0.1, cumulative=True),
        FAST._replace(freeze_iter=2),
        FAST._replace(freeze_iter=10),
        FAST._replace(recomputing=True),
    ],
    ids=str,
)
def test_the_weight_of_a_batch_is_that_of_the_plain_form(averaging: Averaging, forwards: int, gained: bool) -> None:
    shape, seen, blocks = (3, 5, 5, 6), PIXEL, Blocks(1, 5)
    check(a_state(blocks, gained, forwards), a_batch(shape, seen, blocks), averaging)


@pytest.mark.parametrize(("shape", "seen", "blocks"), FEW.values(), ids=FEW.keys())
def test_the_first_batch_is_averaged_with_nothing(shape: tuple[int, ...], seen: Window, blocks: Blocks) -> None:
    state = a_state(blocks, True, 0)
    state.gained[1].zero_()
    state.running_deconv.fill_(1e6)
    check(state, a_batch(shape, seen, blocks), FAST)


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize(("shape", "seen", "blocks"), FEW.values(), ids=FEW.keys())
def test_batches_that_are_not_finite_are_counted_and_change_nothing(
    shape: tuple[int, ...], seen: Window, blocks: Blocks, gained: bool
) -> None:
    state, batch = a_state(blocks, gained), a_batch(shape, seen, blocks)
    for poison in (float("nan"), float("inf")):
        batch[3][-1, -1, -1] = poison
        moved = state.clone()
        assert kernels.average_in_(*moved, *batch, FAST)
        assert moved.counter == state.counter + 1
        assert all(map(torch.equal, moved.tensors()[:-1], state.tensors()[:-1]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_between_samples_do_not_reach_the_averages(poison: float) -> None:
    shape, seen, blocks = CASES["depthwise"]
    state, batch = a_state(blocks, True), a_batch(shape, seen, blocks)
    batch[0][0, 3] = poison
    kernels.average_in_(*state, *batch, FAST)
    assert all(value.isfinite().all() for value in state.tensors())


@pytest.mark.parametrize(("shape", "seen", "blocks"), FEW.values(), ids=FEW.keys())
def test_frozen_and_repeated_forwards_change_nothing_and_only_the_former_are_counted(
    shape: tuple[int, ...], seen: Window, blocks: Blocks
) -> None:
    frozen, repeated = FAST._replace(freeze_iter=2), FAST._replace(recomputing=True)
    for forwards, averaging, counted in ((3, frozen, 1), (2 * CYCLE - 1, frozen, 1), (1, repeated, 0)):
        state = a_state(blocks, True, forwards)
        moved = state.clone()
        assert not kernels.average_in_(*moved, *a_batch(shape, seen, blocks), averaging)
        assert moved.counter == forwards + counted
        assert all(map(torch.equal, moved.tensors()[:-1], state.tensors()[:-1]))


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize(("shape", "seen", "blocks"), FEW.values(), ids=FEW.keys())
def test_buffers_and_images_may_be_in_half_precision(
    shape: tuple[int, ...], seen: Window, blocks: Blocks, gained: bool
) -> None:
    batch = a_batch(shape, seen, blocks)
    batch[0] = batch[0].half()
    check(a_state(blocks, gained).to(torch.float16), batch, FAST)


def test_power_beyond_what_buffers_hold_is_cut_off() -> None:
    shape, seen, blocks = FEW["a block"]
    for dtype, size, most in ((torch.float16, 1e4, 6.5e4), (torch.float32, 1e18, 1e30)):
        state, batch = a_state(blocks, True).to(dtype), a_batch(shape, seen, blocks)
        batch[0], batch[1], batch[2] = (size * value for value in batch[:3])
        kernels.average_in_(*state, *batch, FAST)
        assert all(value.isfinite().all() for value in state.tensors())
        assert 0.6 * most < state.gained[1].min() <= state.gained[1].max() < 0.7 * most  # of a weight of two thirds


def test_what_is_not_for_kernels_is_left_to_the_plain_form() -> None:
    shape, seen, blocks = FEW["a block"]
    state, batch = a_state(blocks, True), a_batch(shape, seen, blocks)
    with pytest.raises(Unfit, match="float64"):
        kernels.average_in_(*state.to(torch.float64), *batch, FAST)
    with pytest.raises(Unfit):
        kernels.average_in_(*state._replace(running_deconv=state.running_deconv.mT), *batch, FAST)
