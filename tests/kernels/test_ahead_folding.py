"""Kernels of folding compile for GPUs that are not here, within their limits, and are launched as seldom as is said."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels.ahead import Launched, check_resources, launches_of, on_gpus
from timm_deconv.kernels import Blocks
from timm_deconv.kernels.gpu import folding

WEIGHTS = {
    "27": ((64, 3, 3, 3), Blocks(1, 27, pixels=False)),
    "64": ((512, 512, 3, 3), Blocks(8, 64)),
    "128": ((128, 128, 3, 3), Blocks(1, 128)),
    "256": ((256, 256, 3, 3), Blocks(1, 256)),
    "147": ((64, 3, 7, 7), Blocks(1, 147, pixels=False)),
    "1": ((64, 64, 1, 1), Blocks(64, 1)),
    "groups of 24": ((96, 24, 3, 3), Blocks(4, 24, groups=4)),
    "depthwise": ((96, 1, 3, 3), Blocks(96, 1, groups=96)),
}
of_weights = pytest.mark.parametrize(("shape", "blocks"), WEIGHTS.values(), ids=WEIGHTS.keys())
TYPED = [(name, dtype) for name in WEIGHTS if name != "128" for dtype in (torch.float32, torch.bfloat16)]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Make a weight, and a folded weight or its gradient with a bias, in another dtype."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    weight, folded = (torch.empty(shape, dtype=own, memory_format=memory_format) for own in (torch.float32, dtype))
    return weight, folded, folded.new_empty(shape[0])


def forward(
    shape: tuple[int, ...], blocks: Blocks, dtype: torch.dtype = torch.bfloat16, channels_last: bool = True
) -> list[Launched]:
    weight, _, bias = tensors(shape, dtype, channels_last)
    mean = torch.empty(blocks.sets, blocks.features)
    given = weight, bias, mean, torch.empty(*mean.shape, blocks.features), blocks, dtype, channels_last
    return launches_of(lambda: folding.fold_whitening(*given))


def backward(
    shape: tuple[int, ...],
    blocks: Blocks,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = True,
    with_statistics: bool = True,
) -> list[Launched]:
    weight, grad, grad_bias = tensors(shape, dtype, channels_last)
    mean = torch.empty(blocks.sets, blocks.features)
    given = grad, grad_bias, weight, mean, torch.empty(*mean.shape, blocks.features), blocks, with_statistics
    return launches_of(lambda: folding.fold_whitening_backward(*given))


@of_weights
def test_folding_is_one_launch_and_the_gradient_of_the_weight_is_another(
    shape: tuple[int, ...], blocks: Blocks
) -> None:
    assert len(forward(shape, blocks)) == len(backward(shape, blocks, with_statistics=False)) == 1


@pytest.mark.parametrize(("name", "launches"), {"27": 1, "64": 2, "256": 2, "147": 2, "depthwise": 1}.items())
def test_gradients_of_the_statistics_cost_one_launch_more_where_rows_are_many(name: str, launches: int) -> None:
    assert len(backward(*WEIGHTS[name])) == launches


@pytest.mark.parametrize("name", ["64", "128", "256"])
def test_programs_fill_a_gpu_and_are_short(name: str) -> None:
    shape, blocks = WEIGHTS[name]
    (fold,), (first, _) = forward(shape, blocks), backward(shape, blocks)
    tiles = -(-blocks.features // 64)
    assert fold.grid[0] >= 40 and math.prod(first.grid) >= 256
    rows = math.prod(shape) // blocks.features
    assert -(-rows // (16 * first.grid[0])) <= 2 * tiles**2 + 10  # tiles of rows that a program takes


@on_gpus(TYPED, [("64", torch.float32), ("147", torch.bfloat16), ("depthwise", torch.float32)])
def test_every_kernel_fits_a_gpu_without_spilling(case: tuple[str, torch.dtype], capability: int) -> None:
    name, dtype = case
    how = {"dtype": dtype, "channels_last": dtype == torch.bfloat16}
    for one in forward(*WEIGHTS[name], **how) + backward(*WEIGHTS[name], **how):
        check_resources(one, capability)


def test_limits_that_are_too_low_fail() -> None:
    for one in forward(*WEIGHTS["64"]) + backward(*WEIGHTS["64"]):
        with pytest.raises(AssertionError, match="registers"):
            check_resources(one, 90, most_registers=40)
