"""How the features of a layer's windows are divided into blocks that are whitened together.

A window has K = channels * kernel positions features, channel-major as `F.unfold` lays them out. They form P blocks of
F features. The blocks share S sets of statistics: one for all (S = 1), or one each (S = P; always so in grouped
convolutions, a group being a block). All functions are rearrangements; TorchScript can compile them.
"""

import math
from typing import NamedTuple

from torch import Tensor

from .config import DeconvCfg

__all__ = [
    "Partition",
    "effective_block",
    "partition_conv",
    "partition_linear",
    "split_rows",
    "split_weight",
    "spread_shift",
    "sum_shift",
    "unsplit_rows",
    "unsplit_weight",
]


class Partition(NamedTuple):
    """P `blocks` of F `features`; `interleaved`: block j holds the features j modulo P; `shared`: S = 1."""

    blocks: int
    features: int
    interleaved: bool
    shared: bool
    groups: int

    @property
    def sets(self) -> int:
        """S, the number of means and covariances."""
        return 1 if self.shared else self.blocks


def effective_block(channels: int, block: int) -> int:
    """The published rule: all channels if the block is larger, their greatest common divisor if it does not divide."""
    return channels if block > channels else math.gcd(block, channels)


def partition_conv(in_channels: int, positions: int, groups: int, cfg: DeconvCfg) -> Partition:
    """Blocks of a convolution with `positions` = kernel height * width (reference: paper section 4.3 and its code)."""
    if groups > 1:
        return Partition(groups, in_channels // groups * positions, False, False, groups)
    width = in_channels * positions
    if cfg.layout == "flat":
        features = effective_block(width, cfg.block)
    else:
        features = positions * effective_block(in_channels, cfg.block)
    blocks = width // features
    return Partition(blocks, features, cfg.layout == "interleaved", not cfg.per_block or blocks == 1, 1)


def partition_linear(in_features: int, cfg: DeconvCfg) -> Partition:
    """Blocks of a linear layer: runs of contiguous features."""
    features = effective_block(in_features, cfg.block)
    blocks = in_features // features
    return Partition(blocks, features, False, not cfg.per_block or blocks == 1, 1)


def split_rows(columns: Tensor, partition: Partition) -> Tensor:
    """(..., K) window features, leading dimensions counting samples -> (S, R, F) rows of each set of statistics."""
    blocks = _split_features(columns, partition)
    if partition.shared:
        return blocks.reshape(1, -1, partition.features)
    return blocks.reshape(-1, partition.blocks, partition.features).transpose(0, 1)


def split_weight(weight: Tensor, partition: Partition) -> Tensor:
    """(O, ...) weight -> (S, N, F) rows that the S whiteners multiply from the right, N = O P / (S groups)."""
    if partition.groups > 1:
        return weight.reshape(partition.blocks, -1, partition.features)
    blocks = _split_features(weight.reshape(weight.shape[0], -1), partition)
    if partition.shared:
        return blocks.reshape(1, -1, partition.features)
    return blocks.transpose(0, 1)


def unsplit_weight(rows: Tensor, shape: list[int], partition: Partition) -> Tensor:
    """The inverse of `split_weight`: (S, N, F) -> a weight of the given shape."""
    if partition.groups > 1:
        return rows.reshape(shape)
    blocks = rows.reshape(shape[0], -1, partition.features) if partition.shared else rows.transpose(0, 1)
    if partition.interleaved:
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(shape)


def sum_shift(shift: Tensor, partition: Partition) -> Tensor:
    """(S, N) products of weight rows with the mean -> (O,), summed over the blocks that an output sees."""
    if partition.groups > 1:
        return shift.reshape(-1)
    if partition.shared:
        return shift.reshape(-1, partition.blocks).sum(1)
    return shift.sum(0)


def spread_shift(grad: Tensor, partition: Partition) -> Tensor:
    """The adjoint of `sum_shift`: (O,) -> (S, N), an output's gradient for each block that it sees."""
    if partition.groups > 1:
        return grad.reshape(partition.blocks, -1)
    if partition.shared:
        return grad.repeat_interleave(partition.blocks).unsqueeze(0)
    return grad.expand(partition.blocks, -1)


def unsplit_rows(rows: Tensor, shape: list[int], partition: Partition) -> Tensor:
    """The inverse of `split_rows`: (S, R, F) -> columns of the given shape (..., K)."""
    if partition.shared:
        blocks = rows.reshape(*shape[:-1], partition.blocks, partition.features)
    else:
        blocks = rows.transpose(0, 1).reshape(*shape[:-1], partition.blocks, partition.features)
    if partition.interleaved:
        blocks = blocks.transpose(-1, -2)
    return blocks.reshape(shape)


def _split_features(columns: Tensor, partition: Partition) -> Tensor:
    if partition.interleaved:
        return columns.unflatten(-1, [partition.features, partition.blocks]).transpose(-1, -2)
    return columns.unflatten(-1, [partition.blocks, partition.features])
