"""How the features that a layer sees are divided into blocks that are whitened together.

A window has K = channels * kernel positions features, channel-major as `F.unfold` lays them out; a pixel has its
channels only. Either forms P blocks of F features. All blocks share one mean and covariance (S = 1); in grouped
convolutions, where a block is a group, each has its own (S = P). All functions are rearrangements; TorchScript can
compile those of weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Blocks",
    "merge_rows",
    "merge_weight",
    "split_rows",
    "split_weight",
    "spread_over_window",
    "sum_over_window",
]


class Blocks(NamedTuple):
    """P blocks of F features.

    Attributes:
        number: P.
        features: F.
        interleaved: block j holds the features j modulo P; else a run of F of them.
        groups: the convolution's.
        pixels: a block is a run of neighbouring channels at one pixel, and a kernel of more than a pixel meets it once
            at every position; else it is a part of a window.
    """

    number: int
    features: int
    interleaved: bool = False
    groups: int = 1
    pixels: bool = True

    @property
    def sets(self) -> int:
        """S, the number of means and covariances."""
        return self.groups if self.groups > 1 else 1

    @property
    def numbers(self) -> list[int]:
        """The blocks as an operator takes them."""
        return [int(value) for value in self]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> "Blocks":
        """Return the blocks that `numbers` was made of."""
        number, features, interleaved, groups, pixels = numbers
        return cls(number, features, bool(interleaved), groups, bool(pixels))


def split_rows(columns: Tensor, blocks: Blocks) -> Tensor:
    """Split columns (..., P F), whose leading dimensions count samples, into rows (S, R, F) of each set.

    Rows of many sets, few features each, are laid out in runs of samples: products of them are several times faster.
    Those of single features stay as they are.
    """
    rows = _split_features(columns, blocks)
    if blocks.groups == 1:
        return rows.reshape(1, -1, blocks.features)
    samples = rows.reshape(-1, blocks.number, blocks.features)
    return samples.transpose(0, 1) if blocks.features == 1 else samples.permute(1, 2, 0).contiguous().mT


def merge_rows(rows: Tensor, shape: list[int], blocks: Blocks) -> Tensor:
    """Merge rows (S, R, F) into columns of the given shape (..., P F): the inverse of `split_rows`."""
    samples = rows if blocks.groups == 1 else rows.transpose(0, 1)
    columns = samples.reshape(*shape[:-1], blocks.number, blocks.features)
    return (columns.transpose(-1, -2) if blocks.interleaved else columns).reshape(shape)


def split_weight(weight: Tensor, blocks: Blocks) -> Tensor:
    """Split a weight (O, ...) into rows (S, N, F) that the whiteners multiply from the right, an output's in a run.

    Blocks of pixels have a row for each kernel position; then it is a view if the weight is in channels_last.
    """
    if blocks.pixels and weight.ndim == 4:
        weight = weight.permute(0, 2, 3, 1)
    if blocks.groups > 1:
        return weight.reshape(blocks.groups, -1, blocks.features)
    if blocks.interleaved:
        weight = _split_features(weight.reshape(-1, blocks.number * blocks.features), blocks)
    return weight.reshape(1, -1, blocks.features)


def merge_weight(rows: Tensor, shape: list[int], blocks: Blocks) -> Tensor:
    """Merge rows (S, N, F) into a weight of the given shape: the inverse of `split_weight`."""
    if blocks.interleaved:
        rows = rows.reshape(-1, blocks.number, blocks.features).transpose(1, 2)
    if blocks.pixels and len(shape) == 4:
        return rows.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape)
    return rows.reshape(shape)


def spread_over_window(vectors: Tensor, shape: list[int], blocks: Blocks) -> Tensor:
    """Spread the vector of each set over all blocks of a window.

    Args:
        vectors: (S, F).
        shape: of a weight (O, ...) that meets the window.

    Returns:
        (S, ...), the window of a group as one output of the weight.
    """
    numbers = 1
    for extent in shape[1:]:
        numbers *= extent
    rows = vectors.unsqueeze(1).expand(-1, numbers // blocks.features, -1)
    return merge_weight(rows, [vectors.shape[0], *shape[1:]], blocks)


def sum_over_window(window: Tensor, blocks: Blocks) -> Tensor:
    """Sum what all blocks of a window (S, ...) hold: (S, F), the adjoint of `spread_over_window`."""
    return split_weight(window, blocks).reshape(blocks.sets, -1, blocks.features).sum(1)


def _split_features(columns: Tensor, blocks: Blocks) -> Tensor:
    if blocks.interleaved:
        return columns.unflatten(-1, [blocks.features, blocks.number]).transpose(-1, -2)
    return columns.unflatten(-1, [blocks.number, blocks.features])
