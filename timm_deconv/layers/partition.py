"""How the features that a layer sees are divided into blocks that are whitened together.

A window has K = channels * kernel positions features, channel-major as `F.unfold` lays them out; a pixel has its
channels only. Either forms P blocks of F features. The blocks share S sets of statistics: one for all (S = 1), or one
each (S = P; always so in grouped convolutions, a group being a block). All functions are rearrangements; TorchScript
can compile them.
"""

import math
from typing import NamedTuple

from torch import Tensor

from .config import DeconvCfg

__all__ = [
    "Partition",
    "effective_block",
    "largest_divisor",
    "partition_conv",
    "partition_linear",
    "split_rows",
    "split_weight",
    "spread_shift",
    "sum_blocks",
    "sum_shift",
    "unsplit_rows",
    "unsplit_weight",
]


class Partition(NamedTuple):
    """P `blocks` of F `features`; `interleaved`: block j holds the features j modulo P; `shared`: S = 1.

    `of_channels`: a block is a run of channels at one pixel, not a part of a window.
    """

    blocks: int
    features: int
    interleaved: bool
    shared: bool
    groups: int
    of_channels: bool

    @property
    def sets(self) -> int:
        """S, the number of means and covariances."""
        return 1 if self.shared else self.blocks

    @property
    def one_whitener(self) -> bool:
        """Whether one D multiplies every run of F channels, so that applying it is a 1x1 convolution."""
        return self.of_channels and self.groups == self.sets == 1


def effective_block(channels: int, block: int) -> int:
    """The published rule: all channels if the block is larger, their greatest common divisor if it does not divide."""
    return channels if block > channels else math.gcd(block, channels)


def partition_conv(in_channels: int, positions: int, groups: int, cfg: DeconvCfg) -> Partition:
    """Blocks of a convolution with `positions` = kernel height * width (reference: paper section 4.3 and its code)."""
    width = in_channels // groups
    of_channels = cfg.layout == "channels" and width * positions > cfg.least_block
    if groups > 1:
        return Partition(groups, width if of_channels else width * positions, False, False, groups, of_channels)
    if of_channels:
        features = largest_divisor(width, cfg.block_of(width))
    elif cfg.layout == "channels":
        features = width * positions
    elif cfg.layout == "flat":
        features = effective_block(width * positions, cfg.block_of(width * positions))
    else:
        features = positions * effective_block(width, cfg.block)
    blocks = width * (1 if of_channels else positions) // features
    interleaved = cfg.layout == "interleaved" and blocks > 1
    contiguous_pixels = positions == 1 and not interleaved
    return Partition(
        blocks, features, interleaved, not cfg.per_block or blocks == 1, 1, of_channels or contiguous_pixels
    )


def partition_linear(in_features: int, cfg: DeconvCfg) -> Partition:
    """Blocks of a linear layer: runs of contiguous features."""
    features = effective_block(in_features, cfg.block_of(in_features))
    blocks = in_features // features
    return Partition(blocks, features, False, not cfg.per_block or blocks == 1, 1, True)


def split_rows(columns: Tensor, partition: Partition) -> Tensor:
    """Features of windows or pixels (..., P F), leading dimensions counting samples -> (S, R, F) rows of each set.

    Rows of many sets, few features each, are laid out in runs of samples: products of them are several times faster.
    Of single features they stay as they are.
    """
    blocks = _split_features(columns, partition)
    if partition.shared:
        return blocks.reshape(1, -1, partition.features)
    samples = blocks.reshape(-1, partition.blocks, partition.features)
    return samples.transpose(0, 1) if partition.features == 1 else samples.permute(1, 2, 0).contiguous().mT


def unsplit_rows(rows: Tensor, shape: list[int], partition: Partition) -> Tensor:
    """The inverse of `split_rows`: (S, R, F) -> columns of the given shape (..., P F)."""
    if partition.shared:
        blocks = rows.reshape(*shape[:-1], partition.blocks, partition.features)
    else:
        blocks = rows.transpose(0, 1).reshape(*shape[:-1], partition.blocks, partition.features)
    if partition.interleaved:
        blocks = blocks.transpose(-1, -2)
    return blocks.reshape(shape)


def split_weight(weight: Tensor, partition: Partition) -> Tensor:
    """(O, ...) weight -> (S, N, F) rows that the S whiteners multiply from the right, an output's rows in a run.

    Blocks of channels have a row for each kernel position; then it is a view if the weight is in channels_last.
    """
    if partition.of_channels and weight.ndim == 4:
        weight = weight.permute(0, 2, 3, 1)
    if partition.groups > 1:
        return weight.reshape(partition.blocks, -1, partition.features)
    if partition.shared and not partition.interleaved:
        return weight.reshape(1, -1, partition.features)
    blocks = _split_features(weight.reshape(-1, partition.blocks * partition.features), partition)
    if partition.shared:
        return blocks.reshape(1, -1, partition.features)
    return blocks.transpose(0, 1)


def unsplit_weight(rows: Tensor, shape: list[int], partition: Partition) -> Tensor:
    """The inverse of `split_weight`: (S, N, F) -> a weight of the given shape."""
    blocks = rows
    if partition.groups == 1 and not partition.shared:
        blocks = rows.transpose(0, 1)
    if partition.interleaved:
        blocks = blocks.reshape(-1, partition.blocks, partition.features).transpose(1, 2)
    if partition.of_channels and len(shape) == 4:
        return blocks.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape)
    return blocks.reshape(shape)


def sum_blocks(rows: Tensor, outputs: int, partition: Partition) -> Tensor:
    """Weight rows (S, N, F) of `outputs` = O outputs -> (S, O / groups, F), summed over what meets the same mean."""
    return rows.unflatten(1, [outputs // partition.groups, -1]).sum(2)


def sum_shift(shift: Tensor, partition: Partition) -> Tensor:
    """(S, O / groups) products of `sum_blocks` with something of each set -> (O,)."""
    return shift.reshape(-1) if partition.groups > 1 or partition.shared else shift.sum(0)


def spread_shift(grad: Tensor, partition: Partition) -> Tensor:
    """The adjoint of `sum_shift`: (O,) -> (S, O / groups)."""
    if partition.groups > 1:
        return grad.reshape(partition.blocks, -1)
    return grad.expand(1 if partition.shared else partition.blocks, -1)


def _split_features(columns: Tensor, partition: Partition) -> Tensor:
    if partition.interleaved:
        return columns.unflatten(-1, [partition.features, partition.blocks]).transpose(-1, -2)
    return columns.unflatten(-1, [partition.blocks, partition.features])


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`."""
    return next(divisor for divisor in range(min(most, number), 0, -1) if number % divisor == 0)
