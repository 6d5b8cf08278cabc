"""On a GPU a batch is averaged in by kernels, which write what the plain form writes in float64 on a CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.tracked import a_batch, a_state
from timm_deconv.kernels import PIXEL, Averaging, Blocks, Window, average_in_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FAST = Averaging(0.1, start_corrected=True)
STEM = Window((3, 3), (2, 2), (1, 1), (1, 1))
CASES = {
    "27": ((16, 3, 15, 17), STEM, Blocks(1, 27, pixels=False), 1),
    "blocks of 12": ((16, 36, 15, 17), PIXEL, Blocks(3, 12), 1),
    "64": ((16, 128, 15, 17), PIXEL._replace(stride=(2, 2)), Blocks(2, 64), 1),
    "147": ((2, 147, 4, 4), PIXEL, Blocks(1, 147), 2),
    "256": ((16, 256, 15, 17), PIXEL, Blocks(1, 256), 2),
    "groups": ((16, 96, 15, 17), PIXEL, Blocks(4, 24, groups=4), 2),
    "depthwise": ((16, 960, 7, 7), PIXEL, Blocks(960, 1, groups=960), 2),
}
of_cases = pytest.mark.parametrize(("shape", "seen", "blocks", "number"), CASES.values(), ids=CASES.keys())


def on_gpu(values: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.cuda, values)


def in_double(values: list[Any]) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in values]


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@of_cases
@torch.no_grad()
def test_averages_are_those_of_the_plain_form(
    shape: tuple[int, ...],
    seen: Window,
    blocks: Blocks,
    number: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    gained: bool,
    launches: list[Any],
) -> None:
    state, batch = a_state(blocks, gained, 0).to(dtype), a_batch(shape, seen, blocks)
    batch[0] = batch[0].to(dtype, memory_format=memory_format)
    moved = on_gpu(state)
    versions = [value._version for value in moved.tensors()]
    for step in (1, 2, 3):
        expected = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, moved.to(torch.float64))
        said = average_in_.function(*expected, *in_double(batch), FAST)
        assert torch.equal(average_in_(*moved, *on_gpu(batch), FAST).cpu(), said)
        assert len(launches) == step * number and moved.counter == step
        for found, exact in zip(moved.tensors(), expected.tensors(), strict=True):
            rounding = max(torch.finfo(dtype).eps, 1e-5)
            torch.testing.assert_close(found.cpu().to(exact.dtype), exact, rtol=2 * rounding, atol=rounding)
    assert all(value._version > version for value, version in zip(moved.tensors(), versions, strict=True))


@of_cases
@torch.no_grad()
def test_replays_of_a_captured_graph_count_and_average_as_eager_calls_do(
    shape: tuple[int, ...], seen: Window, blocks: Blocks, number: int
) -> None:
    batch, averaging = on_gpu(a_batch(shape, seen, blocks)), FAST._replace(freeze_iter=2)
    eager = on_gpu(a_state(blocks, True, 0))
    average_in_(*eager.clone(), *batch, averaging)
    replayed, graph = eager.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average_in_(*replayed, *batch, averaging)
    for _ in range(5):  # over freezing after the third
        graph.replay()
        average_in_(*eager, *batch, averaging)
        assert all(map(torch.equal, replayed.tensors(), eager.tensors()))
    assert replayed.counter == 5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["27", "256", "groups", "depthwise"])
def test_averaging_in_on_a_gpu_is_a_sound_operation(name: str) -> None:
    shape, seen, blocks, _ = CASES[name]
    args = on_gpu((*a_state(blocks, True), *a_batch(shape, seen, blocks), FAST))
    torch.library.opcheck(average_in_.op, tuple(average_in_.encoded(args)))
