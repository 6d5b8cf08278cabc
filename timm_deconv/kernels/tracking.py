"""Running averages of mean and whitener, and of the power that is passed on: one operation that writes them in place.

The counter of batches is read and raised on the device, so that a captured step does at every replay what it should.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_deconv.linalg import full_precision, promote

from .blocks import Blocks, split_rows
from .gain import LARGEST, PROBED_ROWS, first_norm, gain, passed_norm, probe
from .operation import Operation
from .windows import Window, spread_windows

__all__ = ["CYCLE", "RECENT", "Averaging", "average_in_"]

RECENT = 4
"""Where the gain is corrected an early batch weighs about RECENT times what it would in a plain mean of all batches."""

CYCLE = 10
"""A layer that freezes is live again at the start of every `CYCLE * freeze_iter` forwards, as published."""


class Averaging(NamedTuple):
    """How a batch is averaged in.

    Attributes:
        momentum: weight of the newest batch, in (0, 1].
        start_corrected: weigh the first batches so that nothing is left of the start.
        cumulative: average all batches alike.
        freeze_iter: the configuration's, of layers that freeze; 0 for others.
        recomputing: the forward runs a second time for its gradient: compute the same, as selective checkpointing
            counts the operations, and write nothing.
    """

    momentum: float
    start_corrected: bool = False
    cumulative: bool = False
    freeze_iter: int = 0
    recomputing: bool = False

    @property
    def numbers(self) -> list[float]:
        """The averaging as an operator takes it."""
        return [float(value) for value in self]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> "Averaging":
        """Return the averaging that `numbers` was made of."""
        momentum, start_corrected, cumulative, freeze_iter, recomputing = numbers
        return cls(momentum, bool(start_corrected), bool(cumulative), int(freeze_iter), bool(recomputing))


def _average_in_(
    running_mean: Tensor,
    running_deconv: Tensor,
    gained: list[Tensor],
    counter: Tensor,
    x: Tensor,
    own_mean: Tensor,
    mean: Tensor,
    whitener: Tensor,
    varies: Tensor,
    row_count: int,
    seen: Window,
    blocks: Blocks,
    averaging: Averaging,
) -> Tensor:
    """Average in a batch's mean and, of the sets that vary, its whitener; neither if they are not finite. Count it.

    Args:
        running_mean: (S F,). running_deconv: (F, F) or (S, F, F), the running whitener.
        gained: the running gain (S,) and power (2, S), where the gain is corrected; else nothing.
        counter: int64 (), the training forwards before.
        x: the batch (N, C, H, W), of which some rows measure what whiteners pass on.
        own_mean: (S, F), the mean of its samples. mean: (S, F), with the share of padding.
        whitener: (S, F, F). varies: bool (S,), the sets that are not constant.
        row_count: samples that they were estimated from.
        seen: the windows that the layer whitens, of which the rows are spread.
        blocks: of their features.
        averaging: how.

    Returns:
        bool (), whether the batch's statistics are not finite.
    """
    of_mean, of_deconv = running_mean.view(mean.shape), running_deconv.view(whitener.shape)
    with full_precision(x):
        finite = whitener.sum().abs() < math.inf  # false of NaN; the whitener is not finite if the mean is not
        moving, count = _live(counter, finite, averaging)
        count = count.to(whitener.dtype)
        weight = moving * _weight(count, averaging, bool(gained))
        of_sets, mean, value = weight * varies, mean.nan_to_num(0, 0, 0), whitener.nan_to_num(0, 0, 0)
        if gained:
            deviations = _probed_rows(x, seen, blocks) - own_mean.unsqueeze(1)
            passed = passed_norm(deviations + (mean - of_mean).unsqueeze(1), of_deconv.to(whitener.dtype)) / gained[0]
            passed = torch.where(count == 1, first_norm(deviations, whitener, row_count), passed)
            passed = torch.stack([passed, passed_norm(deviations, whitener)])
            latest = passed.square() / (deviations.shape[1] * blocks.features)
            corrected = _corrected(gained, latest, count, of_sets)
            change = corrected[0].to(whitener.dtype) / gained[0]
            value.mul_(corrected[0][:, None, None])
    if not averaging.recomputing:
        if gained:
            of_deconv.mul_(change[:, None, None])
            gained[0].copy_(corrected[0])
            gained[1].copy_(corrected[1])
        _move_(of_deconv, value, of_sets[:, None, None])
        _move_(of_mean, mean, weight)
        counter.add_(1)
    return ~finite


def _live(counter: Tensor, finite: Tensor, averaging: Averaging) -> tuple[Tensor, Tensor]:
    """Return whether this forward moves the averages, bool (), and which one it is of those that are live, from 1 on.

    These are all, or freeze_iter + 1 in every freezing cycle.
    """
    if not averaging.freeze_iter:
        return finite, counter + 1.0
    cycle, live = CYCLE * averaging.freeze_iter, averaging.freeze_iter + 1
    begun = counter % cycle
    return finite & (begun < live), counter // cycle * live + begun.clamp(max=live) + 1.0


def _weight(count: Tensor, averaging: Averaging, gain_corrected: bool) -> Tensor:
    """Return the weight () of the newest batch, the `count`-th: m, or more among the first ones.

    It is m / (1 - (1 - m)^t) at the t-th one: then all batches so far weigh alike at first, and nothing is left of the
    start. When the gain is corrected it is the larger of m and RECENT / (t - 1 + RECENT), as weights move fastest at
    the start.
    """
    momentum = averaging.momentum
    if averaging.cumulative:
        return 1 / count
    if momentum == 1 or not (averaging.start_corrected or gain_corrected):
        return torch.full_like(count, momentum)
    if gain_corrected:
        return (RECENT / (count + (RECENT - 1))).clamp(min=momentum)
    return -momentum / torch.expm1(count * math.log1p(-momentum))


def _probed_rows(x: Tensor, seen: Window, blocks: Blocks) -> Tensor:
    """Return some rows (S, at most PROBED_ROWS, F), evenly spread over the windows of x (N, C, H, W), samples or not.

    A whitener fits its own samples better than what lies between them, and the output is made of both.
    """
    return promote(probe(split_rows(spread_windows(x, seen, PROBED_ROWS), blocks)))


def _corrected(gained: list[Tensor], latest: Tensor, count: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the running gain (S,) and power (2, S) after a batch, in the dtype of the gain and in full precision.

    Args:
        gained: before it.
        latest: (2, S), the powers that running and live whiteners pass on of this batch, the `count`-th.
        weight: (S,), the batch's; 0 of sets whose averages do not move.
    """
    running_gain, running_power = gained
    limits, moving, power = torch.finfo(running_gain.dtype), weight > 0, running_power.to(latest.dtype)
    measured = moving & (latest >= 0)  # not where a row holds what is no number
    latest = torch.where(measured, latest.clamp(max=min(LARGEST, limits.max)), power)
    power = torch.lerp(power, latest, weight)
    after = gain(power, latest, count).clamp(min=max(LARGEST**-0.5, limits.tiny)).to(running_gain.dtype)
    return [torch.where(moving, after, running_gain), power]


def _move_(running: Tensor, value: Tensor, weight: Tensor) -> None:
    """Average a finite value of a batch in, in the running one's dtype."""
    running.lerp_(value.to(running.dtype), weight.to(running.dtype))


def _fake(running_mean: Tensor, *_: object) -> Tensor:
    return running_mean.new_empty((), dtype=torch.bool)


average_in_ = Operation(
    _average_in_,
    "(Tensor(a!) running_mean, Tensor(b!) running_deconv, Tensor(c!)[] gained, Tensor(d!) counter, Tensor x,"
    " Tensor own_mean, Tensor mean, Tensor whitener, Tensor varies, SymInt row_count, SymInt[] seen, SymInt[] blocks,"
    " float[] averaging) -> Tensor",
    mutates_args=("running_mean", "running_deconv", "gained", "counter"),
)
average_in_.register_fake(_fake)
