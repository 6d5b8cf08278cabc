"""On a GPU the operations run by their kernels, and give what the plain forms give in float64 on a CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from timm_deconv.kernels import PIXEL, Blocks, Sampling, add_moments_gradient_, moments, sampled_moments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
GRID = Sampling(PIXEL._replace(stride=(2, 3)), 2, (1, 0))
BLOCKS = {
    "blocks of 12": Blocks(3, 12),
    "64": Blocks(2, 64),
    "147": Blocks(1, 147),
    "256": Blocks(1, 256),
    "groups": Blocks(3, 24, groups=3),
    "depthwise": Blocks(100, 1, groups=100),
}
of_blocks = pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS.keys())


def images(blocks: Blocks, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    """Images (N, C, H, W) on the CPU, whose means are larger than their deviations."""
    values = torch.randn(16, blocks.number * blocks.features, 15, 17) + 3
    return values.to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@DTYPES
@of_blocks
def test_moments_are_those_of_the_plain_form(
    blocks: Blocks, dtype: torch.dtype, memory_format: torch.memory_format, launches: list[Any]
) -> None:
    x = images(blocks, dtype, memory_format)
    mean, cov = sampled_moments(x.cuda(), GRID, blocks)
    assert len(launches) == 2
    assert mean.dtype == cov.dtype == torch.float32
    assert torch.equal(cov, cov.mT)
    expected_mean, expected_cov = moments.plain_moments(x.double(), GRID, blocks)
    torch.testing.assert_close(mean.cpu().double(), expected_mean, rtol=1e-6, atol=0)
    assert (cov.cpu() - expected_cov).norm() <= 1e-5 * expected_cov.norm()


@pytest.mark.parametrize("memory_format", FORMATS)
@DTYPES
@of_blocks
def test_gradients_of_moments_are_those_of_the_plain_form(
    blocks: Blocks, dtype: torch.dtype, memory_format: torch.memory_format, launches: list[Any]
) -> None:
    x, grad_x = images(blocks, dtype, memory_format), images(blocks, dtype)
    mean, cov = moments.plain_moments(x, GRID, blocks)
    expected, on_gpu = grad_x.double(), grad_x.cuda()
    grads = torch.randn_like(mean), cov + cov.mT
    add_moments_gradient_.function(expected, *(g.double() for g in (x, mean, *grads)), GRID, blocks)
    with torch.no_grad():
        add_moments_gradient_(on_gpu, *(g.cuda() for g in (x, mean, *grads)), GRID, blocks)
    assert len(launches) == 1
    found, rounding = on_gpu.cpu().double(), max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(found, expected, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("deviation", [0.01, 1.0])
@of_blocks
def test_a_mean_far_larger_than_the_deviations_costs_no_digits(blocks: Blocks, deviation: float) -> None:
    x = 97 + deviation * images(blocks, torch.float32)
    _, cov = sampled_moments(x.cuda(), GRID, blocks)
    _, expected = moments.plain_moments(x.double(), GRID, blocks)
    assert (cov.cpu() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["64", "groups", "depthwise"])
def test_moments_on_a_gpu_are_a_sound_operation(name: str) -> None:
    blocks = BLOCKS[name]
    x = images(blocks, torch.float32).cuda()
    mean, cov = sampled_moments(x, GRID, blocks)
    for operation, args in (
        (sampled_moments, (x.clone().requires_grad_(), GRID, blocks)),
        (add_moments_gradient_, (torch.zeros_like(x), x, mean, mean, cov, GRID, blocks)),
    ):
        torch.library.opcheck(operation.op, tuple(operation.encoded(args)))


@of_blocks
def test_a_captured_graph_gives_the_same_moments_and_gradients(blocks: Blocks) -> None:
    x = images(blocks, torch.float32).cuda()
    with torch.no_grad():
        expected = step(x, blocks)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(x, blocks)
        graph.replay()
    for ours, eager in zip(captured, expected, strict=True):
        assert torch.equal(ours, eager)


def step(x: Tensor, blocks: Blocks) -> tuple[Tensor, ...]:
    """Moments, and a gradient through them."""
    mean, cov = sampled_moments(x, GRID, blocks)
    grad_x = torch.zeros_like(x)
    add_moments_gradient_(grad_x, x, mean, mean, cov, GRID, blocks)
    return mean, cov, grad_x
