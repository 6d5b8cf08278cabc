"""Averaging a batch in is a sound operation that counts on the device, and changes nothing where it should not."""

import pytest
import torch
from torch import Tensor

from tests.kernels.tracked import a_batch, a_state
from timm_deconv.kernels import PIXEL, Averaging, Blocks, Operation, Window, average_in_
from timm_deconv.kernels.tracking import CYCLE

# torch's own check looks at gradients of inner tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

WINDOW = Window((3, 3), (2, 1), (1, 1), (1, 1))
CASES = {
    "windows": (WINDOW, Blocks(4, 18, interleaved=True, pixels=False)),
    "pixels": (PIXEL, Blocks(2, 4)),
    "groups": (WINDOW, Blocks(2, 36, groups=2, pixels=False)),
    "depthwise": (PIXEL, Blocks(8, 1, groups=8)),
}
SHAPE = 5, 8, 9, 10
FAST = Averaging(0.1, start_corrected=True)


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize(("window", "blocks"), CASES.values(), ids=CASES.keys())
def test_averaging_in_is_a_sound_operation(window: Window, blocks: Blocks, gained: bool) -> None:
    args = [*a_state(blocks, gained), *a_batch(SHAPE, window, blocks), FAST]
    torch.library.opcheck(average_in_.op, tuple(average_in_.encoded(args)))


@pytest.mark.parametrize("gained", [False, True])
def test_recomputation_changes_nothing_and_says_what_the_forward_said(gained: bool) -> None:
    window, blocks = CASES["groups"]
    state, batch = a_state(blocks, gained), a_batch(SHAPE, window, blocks)
    batch[3][0, 0, 0] = float("inf")
    before = state.clone()
    with torch.no_grad():
        assert average_in_(*state, *batch, FAST._replace(recomputing=True))
        batch = a_batch(SHAPE, window, blocks)
        assert not average_in_(*state, *batch, FAST._replace(recomputing=True))
    for value, expected in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("gained", [False, True])
def test_frozen_forwards_of_a_cycle_are_counted_on_the_device_and_move_nothing(gained: bool) -> None:
    window, blocks = CASES["pixels"]
    state, moved = a_state(blocks, gained, 0), []
    for _ in range(2 * CYCLE + 5):
        before = state.clone()
        with torch.no_grad():
            average_in_(*state, *a_batch(SHAPE, window, blocks), FAST._replace(freeze_iter=2))
        moved.append(not torch.equal(state.running_deconv, before.running_deconv))
        if not moved[-1]:
            assert all(map(torch.equal, state.tensors()[:-1], before.tensors()[:-1]))
    assert moved == [step % (2 * CYCLE) <= 2 for step in range(2 * CYCLE + 5)]
    assert state.counter == 2 * CYCLE + 5


def test_sets_that_do_not_vary_keep_their_whitener_and_gain_but_not_their_mean() -> None:
    window, blocks = CASES["depthwise"]
    state, batch = a_state(blocks, True), a_batch(SHAPE, window, blocks)
    before, still = state.clone(), ~batch[4]
    with torch.no_grad():
        average_in_(*state, *batch, FAST)
    for value, expected in zip(state.tensors()[1:-1], before.tensors()[1:-1], strict=True):
        changed = (value != expected).reshape(-1, *still.shape)
        assert torch.equal(changed.all(0), ~still)
    assert (state.running_mean != before.running_mean).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_between_samples_do_not_reach_the_averages(poison: float) -> None:
    window, blocks = CASES["depthwise"]
    state, batch = a_state(blocks, True), a_batch(SHAPE, window, blocks)
    batch[0][0, 3] = poison
    with torch.no_grad():
        average_in_(*state, *batch, FAST)
    assert all(value.isfinite().all() for value in state.tensors())


def test_half_precision_buffers_are_those_of_full_precision_rounded() -> None:
    window, blocks = CASES["pixels"]
    state, batch = a_state(blocks, True), a_batch(SHAPE, window, blocks)
    half, exact = state.to(torch.float16), state
    with torch.no_grad():
        average_in_(*half, *batch, FAST)
        average_in_(*exact, *batch, FAST)
    for value, expected in zip(half.tensors()[:-1], exact.tensors()[:-1], strict=True):
        assert value.dtype == torch.float16
        torch.testing.assert_close(value.float(), expected, rtol=5e-3, atol=5e-3)


def test_the_versions_of_everything_a_kernel_writes_are_raised_lists_too() -> None:
    operation = Operation(_fill_, "(Tensor(a!) x, Tensor(b!)[] others) -> ()", mutates_args=("x", "others"))
    operation.register_kernel("cpu", lambda x, others: None)
    tensors = [torch.zeros(2) for _ in range(3)]
    with torch.no_grad():
        operation(tensors[0], tensors[1:])
    assert [tensor._version for tensor in tensors] == [1, 1, 1]


def _fill_(x: Tensor, others: list[Tensor]) -> None:
    for tensor in (x, *others):
        tensor.fill_(1)
