"""Kernels of moments compile for GPUs that are not here, within their limits, and are launched as seldom as is said."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels.ahead import Launched, check_resources, launches_of, on_gpus
from timm_deconv.kernels import PIXEL, Blocks, Sampling
from timm_deconv.kernels.gpu import moments

BLOCKS = {
    "27": Blocks(1, 27),
    "64": Blocks(1, 64),
    "128": Blocks(1, 128),
    "256": Blocks(1, 256),
    "four of 64": Blocks(4, 64),
    "groups of 4": Blocks(32, 4, groups=32),
    "depthwise": Blocks(96, 1, groups=96),
}
SAMPLING = Sampling(PIXEL._replace(stride=(2, 2)), 3, (1, 0))
of_blocks = pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS.keys())
TYPED = [(name, dtype) for name in BLOCKS if name != "128" for dtype in (torch.float32, torch.bfloat16)]


def images(blocks: Blocks, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(64, blocks.number * blocks.features, size, size, dtype=dtype)


def channels_last(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    return images(blocks, 28, dtype).contiguous(memory_format=torch.channels_last)


def forward(x: Tensor, blocks: Blocks) -> list[Launched]:
    return launches_of(lambda: moments.sampled_moments(x, SAMPLING, blocks))


def backward(x: Tensor, blocks: Blocks) -> list[Launched]:
    mean = torch.empty(blocks.sets, blocks.features)
    given = torch.empty_like(x), x, mean, mean, torch.empty(*mean.shape, blocks.features), SAMPLING, blocks
    return launches_of(lambda: moments.add_moments_gradient_(*given))


@of_blocks
def test_moments_are_two_launches_and_their_gradient_is_one(blocks: Blocks) -> None:
    x = channels_last(blocks)
    assert [len(forward(x, blocks)), len(backward(x, blocks))] == [2, 1]


@pytest.mark.parametrize(("features", "rows"), [(64, 10**7), (256, 1024), (1024, 10**5)])
def test_chunks_take_little_memory_and_their_programs_are_enough(features: int, rows: int) -> None:
    x = torch.empty(1, features, 1, 1).expand(3 * rows, -1, 4, -1)
    first, _ = forward(x, Blocks(1, features))
    parts = dict(zip(first.kernel.arg_names, first.args, strict=False))["parts"]
    assert parts.nbytes <= 2**23
    chunks, tiles, _ = first.grid
    assert 100 <= chunks * tiles * (tiles + 1) // 2 <= 264


@on_gpus(TYPED, [("256", torch.bfloat16), ("depthwise", torch.bfloat16)])
def test_every_kernel_fits_a_gpu_without_spilling(case: tuple[str, torch.dtype], capability: int) -> None:
    name, dtype = case
    blocks = BLOCKS[name]
    x = channels_last(blocks, dtype)
    for one in forward(x, blocks) + backward(x, blocks):
        check_resources(one, capability)


@on_gpus(["64", "256", "depthwise"], ["256", "depthwise"])
def test_steps_that_are_no_multiples_of_sixteen_cost_two_registers_of_stack_at_most(case: str, capability: int) -> None:
    blocks = BLOCKS[case]
    x = images(blocks, 27)
    for one in forward(x, blocks) + backward(x, blocks):
        check_resources(one, capability, most_stack=8)


def test_limits_that_are_too_low_fail() -> None:
    x, blocks = channels_last(BLOCKS["64"]), BLOCKS["64"]
    for one in forward(x, blocks) + backward(x, blocks):
        with pytest.raises(AssertionError, match="registers"):
            check_resources(one, 90, most_registers=40)
