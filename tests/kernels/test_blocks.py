"""Blocks hold the features that they are said to hold, and rearrangements have exact inverses and adjoints."""

import pytest
import torch

from timm_deconv.kernels.blocks import (
    Blocks,
    merge_rows,
    merge_weight,
    split_rows,
    split_weight,
    spread_over_window,
    sum_over_window,
)

BLOCKS = {
    "interleaved": (Blocks(4, 18, interleaved=True, pixels=False), (6, 8, 3, 3)),
    "window": (Blocks(4, 18, pixels=False), (6, 8, 3, 3)),
    "pixels": (Blocks(2, 4), (6, 8, 3, 3)),
    "pixels of a kernel of one": (Blocks(2, 4), (6, 8, 1, 1)),
    "groups": (Blocks(2, 36, groups=2, pixels=False), (6, 4, 3, 3)),
    "pixels of groups": (Blocks(2, 4, groups=2), (6, 4, 3, 3)),
    "depthwise": (Blocks(8, 1, groups=8), (16, 1, 3, 3)),
    "linear": (Blocks(3, 5), (6, 15)),
}
cases = pytest.mark.parametrize(("blocks", "shape"), BLOCKS.values(), ids=BLOCKS.keys())


def test_interleaved_blocks_hold_every_pth_feature_and_others_a_run() -> None:
    columns = torch.arange(12.0).view(1, 12)
    assert split_rows(columns, Blocks(3, 4, interleaved=True))[0].tolist() == [
        [0, 3, 6, 9],
        [1, 4, 7, 10],
        [2, 5, 8, 11],
    ]
    assert split_rows(columns, Blocks(3, 4))[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    groups = split_rows(torch.cat([columns, -columns]), Blocks(3, 4, groups=3))
    assert groups[1].tolist() == [[4, 5, 6, 7], [-4, -5, -6, -7]]


@cases
def test_merging_is_the_inverse_of_splitting(blocks: Blocks, shape: tuple[int, ...]) -> None:
    columns = torch.randn(5, 7, blocks.number * blocks.features)
    rows = split_rows(columns, blocks)
    assert rows.shape == (blocks.sets, 35 * blocks.number // blocks.sets, blocks.features)
    assert torch.equal(merge_rows(rows, list(columns.shape), blocks), columns)
    weight = torch.randn(shape)
    rows = split_weight(weight, blocks)
    assert rows.shape[::2] == (blocks.sets, blocks.features)
    assert torch.equal(merge_weight(rows, list(shape), blocks), weight)


@cases
def test_a_spread_vector_meets_every_weight_at_its_own_feature(blocks: Blocks, shape: tuple[int, ...]) -> None:
    weight, vectors = torch.randn(shape).double(), torch.randn(blocks.sets, blocks.features).double()
    window = spread_over_window(vectors, list(shape), blocks)
    found = (weight.unflatten(0, [blocks.sets, -1]) * window.unsqueeze(1)).flatten(2).sum(2).flatten()
    of_rows = (split_weight(weight, blocks) @ vectors.unsqueeze(-1)).reshape(shape[0], -1).sum(1)
    torch.testing.assert_close(found, of_rows)
    other = torch.randn_like(window)
    torch.testing.assert_close((window * other).sum(), (vectors * sum_over_window(other, blocks)).sum())


@cases
def test_blocks_are_those_that_their_numbers_say(blocks: Blocks, shape: tuple[int, ...]) -> None:
    assert Blocks.of_numbers(blocks.numbers) == blocks
