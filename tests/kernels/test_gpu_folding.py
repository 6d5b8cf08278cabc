"""On a GPU folding runs by its kernels, and gives what the plain form gives in float64 on a CPU."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from timm_deconv.kernels import Blocks, fold_whitening, fold_whitening_backward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FORMATS = [torch.contiguous_format, torch.channels_last]
WEIGHTS = {
    "27": ((64, 3, 3, 3), Blocks(1, 27, pixels=False)),
    "64": ((256, 512, 3, 3), Blocks(8, 64)),
    "64, kernels of one": ((512, 2048, 1, 1), Blocks(32, 64)),
    "128": ((128, 128, 3, 3), Blocks(1, 128)),
    "147": ((64, 3, 7, 7), Blocks(1, 147, pixels=False)),
    "256": ((256, 256, 3, 3), Blocks(1, 256)),
    "512": ((1000, 2048, 1, 1), Blocks(4, 512)),
    "groups": ((96, 24, 3, 3), Blocks(4, 24, groups=4)),
    "depthwise": ((960, 1, 5, 5), Blocks(960, 1, groups=960)),
}
of_weights = pytest.mark.parametrize(("shape", "blocks"), WEIGHTS.values(), ids=WEIGHTS.keys())


def inputs(shape: tuple[int, ...], blocks: Blocks, memory_format: torch.memory_format) -> list[Tensor]:
    """Draw a weight, a bias, a mean and a whitener on the CPU."""
    weight = torch.randn(shape).contiguous(memory_format=memory_format)
    sets, features = blocks.sets, blocks.features
    return [weight, torch.randn(shape[0]), torch.randn(sets, features), torch.randn(sets, features, features)]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for value, reference in zip(found, expected, strict=True):
        assert (value.cpu().double() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@of_weights
@torch.no_grad()
def test_folding_and_its_gradients_are_those_of_the_plain_form(
    shape: tuple[int, ...],
    blocks: Blocks,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    launches: list[Any],
) -> None:
    given, last = inputs(shape, blocks, memory_format), memory_format == torch.channels_last
    weight, bias, *statistics = (value.cuda() for value in given)
    found = fold_whitening(weight, bias, *statistics, blocks, dtype, last)
    assert len(launches) == 1
    assert {value.dtype for value in found} == {dtype} and found[0].is_contiguous(memory_format=memory_format)
    exact = [value.double() for value in given]
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    assert_near(found, fold_whitening(*exact, blocks, torch.float64, last), rounding)
    grads = [torch.randn_like(value) for value in found]
    own, of_statistics = fold_whitening_backward(*grads, weight, *statistics, blocks, True)
    assert len(launches) in (2, 3)
    exact_grads = [value.cpu().double() for value in grads]
    expected, expected_of_statistics = fold_whitening_backward(*exact_grads, exact[0], *exact[2:], blocks, True)
    assert_near([own, *of_statistics], [expected, *expected_of_statistics], 1e-5)
    assert torch.equal(own, fold_whitening_backward(*grads, weight, *statistics, blocks, False)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["27", "128", "groups", "depthwise"])
def test_folding_on_a_gpu_is_a_sound_operation(name: str) -> None:
    shape, blocks = WEIGHTS[name]
    given = [value.cuda() for value in inputs(shape, blocks, torch.channels_last)]
    args = (*(value.clone().requires_grad_() for value in given), blocks, torch.bfloat16, True)
    torch.library.opcheck(fold_whitening.op, tuple(fold_whitening.encoded(args)))
    args = (torch.randn_like(given[0]).bfloat16(), given[1], given[0], *given[2:], blocks, True)
    torch.library.opcheck(fold_whitening_backward.op, tuple(fold_whitening_backward.encoded(args)))


@of_weights
@torch.no_grad()
def test_a_captured_graph_folds_as_an_eager_call_does(shape: tuple[int, ...], blocks: Blocks) -> None:
    weight, bias, *statistics = (value.cuda() for value in inputs(shape, blocks, torch.channels_last))

    def step() -> list[Tensor]:
        folded = fold_whitening(weight, bias, *statistics, blocks, torch.float32, True)
        own, of_statistics = fold_whitening_backward(*folded, weight, *statistics, blocks, True)
        return [*folded, own, *of_statistics]

    expected, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(ours, eager) for ours, eager in zip(captured, expected, strict=True))
