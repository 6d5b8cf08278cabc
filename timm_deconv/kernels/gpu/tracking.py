"""A batch averaged into the running statistics, in two launches: what whiteners pass on is measured, then all is set.

The first launch only reads buffers, and hands on what the second one's programs must all know; so none of them reads
what another writes. Of that launch the first program writes gain, power and counter, and each its own part of the rest.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from ..gain import EARLY, LARGEST, PROBED_ROWS, TINY
from ..tracking import CYCLE, RECENT, Averaging, probed_rows
from ..windows import Window
from .launch import Unfit, check_dtypes, launch, padded, tiles

__all__ = ["average_in_"]

ROWS = 32
"""Probed rows that a program measures at a time."""

CHANNELS = 64
"""Channels that a program takes where each is a set of its own."""

FIELDS = 8
"""Numbers of each set that the first launch hands on."""

MOST_SETS = 4096
"""Sets that a program judges together."""

TINY_: tl.constexpr = tl.constexpr(TINY)
EARLY_: tl.constexpr = tl.constexpr(float(EARLY))
RECENT_: tl.constexpr = tl.constexpr(float(RECENT))
CYCLE_: tl.constexpr = tl.constexpr(CYCLE)
CUMULATIVE, CONSTANT, FROM_START, FROM_RECENT = (tl.constexpr(kind) for kind in range(4))


def average_in_(
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
    """Average in a batch, and count it."""
    sets, features = mean.shape
    buffers = [running_mean, running_deconv, *gained]
    check_dtypes(x, mean, whitener, *buffers)
    if sets > MOST_SETS or not all(buffer.is_contiguous() for buffer in buffers):
        raise Unfit
    single = features == 1 and blocks.groups > 1
    rows, place = _probes(x, seen, blocks) if gained else (1, [x, *[0] * 10])
    width, across = (CHANNELS, 1) if single else (padded(features), tiles(features))
    chunks = 1 if single or not gained else -(-rows // ROWS)
    parts = across * chunks
    scratch = torch.empty(FIELDS * sets * parts + 2, dtype=torch.float32, device=x.device)
    nonfinite = torch.empty((), dtype=torch.bool, device=x.device)
    gain, power = gained or (running_mean, running_mean)
    tensors = [t.contiguous() for t in (own_mean, mean, whitener)]
    state = [running_mean, running_deconv, gain, power, counter, scratch]
    numbers = [rows, features, sets, parts, averaging.freeze_iter, int(averaging.recomputing)]
    sized = {"WIDTH": width, "GAINED": bool(gained)}
    measure, update = (_measure_channels, _update_channels) if single else (_measure, _update)
    grid = [-(-sets // CHANNELS)] if single else [parts, sets]
    pixels = seen.pointwise
    launch(measure, grid, *place, *tensors, *state, *numbers, ROWS=ROWS, PIXELS=pixels, warps=8, **sized)
    limits = torch.finfo(gain.dtype)
    scale = (row_count + 1) / max(row_count - 1, 1) / features
    judged = [float(scale), min(LARGEST, limits.max), max(LARGEST**-0.5, limits.tiny), averaging.momentum]
    numbers = [rows, features, sets, parts, int(averaging.recomputing), *judged]
    sized |= {"SETS": triton.next_power_of_2(sets), "PARTS": triton.next_power_of_2(parts)}
    grid = [-(-sets // CHANNELS)] if single else [across * across, sets]
    tensors = [*tensors[1:], varies.contiguous(), *state, nonfinite]
    launch(update, grid, *tensors, *numbers, WEIGHT=_weighting(averaging, bool(gained)), warps=8, **sized)
    return nonfinite


def _weighting(averaging: Averaging, gain_corrected: bool) -> int:
    """Return how the weight of a batch follows from its number."""
    if averaging.cumulative:
        return CUMULATIVE.value
    if averaging.momentum == 1 or not (averaging.start_corrected or gain_corrected):
        return CONSTANT.value
    return FROM_RECENT.value if gain_corrected else FROM_START.value


def _probes(x: Tensor, seen: Window, blocks: Blocks) -> tuple[int, list[Any]]:
    """Return how many rows of a set are probed, and where they lie in x, or in a copy where windows are no pixels."""
    if not seen.pointwise:
        rows = probed_rows(x, seen, blocks)
        (of_set, of_row, of_feature), one = rows.stride(), 1
        return rows.shape[1], [rows, of_set, of_row, 0, of_feature, one, one, one, one, one, one]
    if not blocks.pixels or blocks.interleaved:
        raise Unfit
    (image, channel, row, column), (down, right) = x.stride(), seen.stride
    height, width = seen.grid((x.shape[2], x.shape[3]))
    in_image, of_set = height * width, blocks.number // blocks.sets
    total = x.shape[0] * in_image
    samples = min(PROBED_ROWS, total)
    every = -(-samples * of_set // PROBED_ROWS)
    place = [x, image, down * row, right * column, channel, total, in_image, width, samples, every, of_set]
    return -(-samples * of_set // every), place


@triton.jit
def _measure(
    x, image, down, right, channel, total, in_image, columns, samples, every, of_set,
    own_mean, mean, whitener, running_mean, running_deconv, gain, power, counter, scratch,
    rows, features, sets, parts, freeze_iter, recomputing,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr,
):  # fmt: skip
    """Measure what live and running whitener of a set make of some probed rows, in a tile of features."""
    part, group = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(features, WIDTH)
    tile, chunk = part % across, part // across
    output = tile * WIDTH + tl.arange(0, WIDTH)
    real_output = output < features
    row = chunk * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    whitener += group.to(tl.int64) * features * features
    running_deconv += group.to(tl.int64) * features * features
    place = _row_at(row, group, image, down, right, channel, total, in_image, columns, samples, every, of_set,
                    features, PIXELS)  # fmt: skip
    live, average = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    squares, norms = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    finite = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, features, WIDTH):
        feature = first + tl.arange(0, WIDTH)
        real = feature < features
        inside, at = real[:, None] & real_output[None, :], feature[:, None] * features + output[None, :]
        matrix = tl.load(whitener + at, inside, other=0).to(tl.float32)
        finite += tl.sum(matrix, 0)
        if GAINED:
            own, late = _deviations(x + place, feature, channel, own_mean + group * features, mean + group * features,
                                    running_mean + group * features, there, real)  # fmt: skip
            live = tl.dot(own, matrix, live, input_precision="tf32x3")
            norms += tl.sum(matrix * matrix, 0)
            if first == tile * WIDTH:
                squares += tl.sum(own * own, 0)
            matrix = tl.load(running_deconv + at, inside, other=0).to(tl.float32)
            average = tl.dot(late, matrix, average, input_precision="tf32x3")
    field = sets * parts
    scratch_of = scratch + group * parts + part
    tl.store(scratch_of, (tl.abs(tl.sum(finite, 0)) < float("inf")).to(tl.float32))
    if GAINED:
        tl.store(scratch_of + field, tl.sum(tl.sum(live * live, 1), 0))
        tl.store(scratch_of + 2 * field, tl.sum(tl.sum(average * average, 1), 0))
        tl.store(scratch_of + 3 * field, tl.sum(squares, 0))
        tl.store(scratch_of + 4 * field, tl.where(chunk == 0, tl.sum(norms, 0), 0))
        first_part = part == 0
        tl.store(scratch_of + 5 * field, tl.load(gain + group).to(tl.float32), first_part)
        tl.store(scratch_of + 6 * field, tl.load(power + group).to(tl.float32), first_part)
        tl.store(scratch_of + 7 * field, tl.load(power + sets + group).to(tl.float32), first_part)
    if (part == 0) & (group == 0):
        _count(counter, scratch + 8 * field, freeze_iter, recomputing)


@triton.jit
def _measure_channels(
    x, image, down, right, channel, total, in_image, columns, samples, every, of_set,
    own_mean, mean, whitener, running_mean, running_deconv, gain, power, counter, scratch,
    rows, features, sets, parts, freeze_iter, recomputing,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr,
):  # fmt: skip
    """Do what `_measure` does for channels of which each is a set of its own."""
    group = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = group < sets
    live = tl.load(whitener + group, real, other=0).to(tl.float32)
    tl.store(scratch + group, (tl.abs(live) < float("inf")).to(tl.float32), real)
    if GAINED:
        mu = tl.load(own_mean + group, real, other=0).to(tl.float32)
        shift = tl.load(mean + group, real, other=0).to(tl.float32)
        shift -= tl.load(running_mean + group, real, other=0).to(tl.float32)
        squares, late = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & real[None, :]
            place = _row_at(row, 0, image, down, right, channel, total, in_image, columns, samples, every, of_set,
                            features, PIXELS)  # fmt: skip
            along = group.to(tl.int64) * (channel if PIXELS else image)
            values = tl.load(x + place + along[None, :], inside, other=0).to(tl.float32)
            own = tl.where(inside, values - mu[None, :], 0)
            squares += tl.sum(own * own, 0)
            own = tl.where(inside, own + shift[None, :], 0)
            late += tl.sum(own * own, 0)
        running = tl.load(running_deconv + group, real, other=0).to(tl.float32)
        tl.store(scratch + sets + group, squares * live * live, real)
        tl.store(scratch + 2 * sets + group, late * running * running, real)
        tl.store(scratch + 3 * sets + group, squares, real)
        tl.store(scratch + 4 * sets + group, live * live, real)
        tl.store(scratch + 5 * sets + group, tl.load(gain + group, real, other=1).to(tl.float32), real)
        tl.store(scratch + 6 * sets + group, tl.load(power + group, real, other=1).to(tl.float32), real)
        tl.store(scratch + 7 * sets + group, tl.load(power + sets + group, real, other=1).to(tl.float32), real)
    if tl.program_id(0) == 0:
        _count(counter, scratch + 8 * sets, freeze_iter, recomputing)


@triton.jit
def _update(
    mean, whitener, varies, running_mean, running_deconv, gain, power, counter, scratch, nonfinite,
    rows, features, sets, parts, recomputing, scale, most, least, momentum,
    WEIGHT: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Average a tile of a set's whitener in, and with the first column of tiles a part of its mean."""
    across, group = tl.cdiv(features, WIDTH), tl.program_id(1)
    tile, other = tl.program_id(0) // across, tl.program_id(0) % across
    only = (tl.program_id(0) == 0) & (group == 0)
    weight, of_sets, after, change = _judge(
        varies, gain, power, counter, scratch, nonfinite, rows, features, sets, parts, recomputing, scale, most, least,
        momentum, only, WEIGHT, GAINED, SETS, PARTS,
    )  # fmt: skip
    here = tl.arange(0, SETS) == group
    own = tl.sum(tl.where(here, of_sets, 0), 0)
    feature, output = tile * WIDTH + tl.arange(0, WIDTH), other * WIDTH + tl.arange(0, WIDTH)
    real = feature < features
    inside = real[:, None] & (output < features)[None, :]
    at = group.to(tl.int64) * features * features + feature[:, None] * features + output[None, :]
    running = tl.load(running_deconv + at, inside, other=0).to(tl.float32)
    value = tl.load(whitener + at, inside, other=0).to(tl.float32)
    if GAINED:
        running *= tl.sum(tl.where(here, change, 0), 0)
        value *= tl.sum(tl.where(here, after, 0), 0)
    _move(running_deconv + at, running, value, own, inside)
    at = group * features + feature
    first = real & (other == 0)
    running = tl.load(running_mean + at, first, other=0).to(tl.float32)
    value = tl.load(mean + at, first, other=0).to(tl.float32)
    _move(running_mean + at, running, value, weight, first)


@triton.jit
def _update_channels(
    mean, whitener, varies, running_mean, running_deconv, gain, power, counter, scratch, nonfinite,
    rows, features, sets, parts, recomputing, scale, most, least, momentum,
    WEIGHT: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Do what `_update` does for channels of which each is a set of its own: every program judges all, for its own."""
    only = tl.program_id(0) == 0
    weight, of_sets, after, change = _judge(
        varies, gain, power, counter, scratch, nonfinite, rows, features, sets, parts, recomputing, scale, most, least,
        momentum, only, WEIGHT, GAINED, SETS, PARTS,
    )  # fmt: skip
    group = tl.arange(0, SETS)
    inside = (group < sets) & (group // WIDTH == tl.program_id(0))
    running = tl.load(running_deconv + group, inside, other=0).to(tl.float32)
    value = tl.load(whitener + group, inside, other=0).to(tl.float32)
    if GAINED:
        running *= change
        value *= after
    _move(running_deconv + group, running, value, of_sets, inside)
    running = tl.load(running_mean + group, inside, other=0).to(tl.float32)
    value = tl.load(mean + group, inside, other=0).to(tl.float32)
    _move(running_mean + group, running, value, weight, inside)


@triton.jit
def _judge(
    varies, gain, power, counter, scratch, nonfinite, rows, features, sets, parts, recomputing, scale, most, least,
    momentum, only, WEIGHT: tl.constexpr, GAINED: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Return the weight of the batch, that in each set, the gain afterwards and its change.

    One program writes gain, power, counter and whether the batch is not finite.
    """
    group = tl.arange(0, SETS)
    real, field = group < sets, sets * parts
    finite = tl.min(tl.min(_of_parts(scratch, 1, sets, parts, SETS, PARTS), 1), 0) > 0
    count, moves = tl.load(scratch + 8 * field), tl.load(scratch + 8 * field + 1)
    weight = tl.where(finite, moves * _weight(count, momentum, WEIGHT), 0)
    of_sets = tl.where(tl.load(varies + group, real, other=0) != 0, weight, 0)
    after, change = tl.full((SETS,), 1, tl.float32), tl.full((SETS,), 1, tl.float32)
    if GAINED:
        live = tl.sum(_of_parts(scratch + field, 0, sets, parts, SETS, PARTS), 1)
        average = tl.sum(_of_parts(scratch + 2 * field, 0, sets, parts, SETS, PARTS), 1)
        squares = tl.sum(_of_parts(scratch + 3 * field, 0, sets, parts, SETS, PARTS), 1)
        norms = tl.sum(_of_parts(scratch + 4 * field, 0, sets, parts, SETS, PARTS), 1)
        before = tl.load(scratch + 5 * field + group * parts, real, other=1)
        passed = tl.load(scratch + 6 * field + group * parts, real, other=0)
        live_passed = tl.load(scratch + 7 * field + group * parts, real, other=0)
        expected = tl.maximum(squares, tl.sum(squares, 0) / sets) * norms * scale
        number = (rows * features).to(tl.float32)
        latest = tl.where(count == 1, expected, average / (before * before)) / number
        moving = of_sets > 0
        latest = tl.where(moving, tl.minimum(latest, most), passed)
        live = tl.where(moving, tl.minimum(live / number, most), live_passed)
        passed += of_sets * (latest - passed)
        live_passed += of_sets * (live - live_passed)
        passed = passed.to(power.dtype.element_ty).to(tl.float32)
        live_passed = live_passed.to(power.dtype.element_ty).to(tl.float32)
        after = tl.minimum(tl.maximum(_gain(passed, live_passed, latest, live, count, real), least), most)
        after = tl.where(moving, after, before).to(gain.dtype.element_ty).to(tl.float32)
        change = after / before
        tl.store(power + group, passed, real & only)
        tl.store(power + sets + group, live_passed, real & only)
        tl.store(gain + group, after, real & only)
    if only:
        tl.store(counter, tl.load(counter) + 1 - recomputing)
        tl.store(nonfinite, finite == 0)
    return weight, of_sets, after, change


@triton.jit
def _gain(passed, live_passed, latest, live, count, real):
    """Compute the gain of every set; see `timm_deconv.kernels.gain`."""
    share = 1 / count
    number = tl.sum(real.to(tl.float32), 0) * TINY_
    averaged, live_averaged = tl.sum(passed, 0) + number, tl.sum(live_passed, 0) + number
    of_latest = tl.sum(tl.where(real, latest, 0), 0) + number
    live_of_latest = tl.sum(tl.where(real, live, 0), 0) + number
    behind = tl.maximum((of_latest / averaged) / (live_of_latest / live_averaged), 1)
    behind = tl.exp2(tl.minimum(share * EARLY_ + 1, 3) * tl.log2(behind))
    excess = (passed + TINY_) / (live_passed + TINY_) * behind
    return 1 / tl.sqrt(excess * (1 + 2 * share * share))


@triton.jit
def _weight(count, momentum, WEIGHT: tl.constexpr):
    """Compute the weight of a batch, the `count`-th."""
    if WEIGHT == CUMULATIVE:
        return 1 / count
    elif WEIGHT == FROM_RECENT:
        return tl.maximum(1 / (count + (RECENT_ - 1)) * RECENT_, momentum)
    elif WEIGHT == FROM_START:
        exponent = count * tl.log(1 - momentum)
        left = tl.exp(exponent)
        # left - 1 without loss of digits (Kahan)
        lost = tl.where(left == 1, exponent, (left - 1) * exponent / tl.log(left))
        return -momentum / lost
    else:
        return momentum + 0 * count


@triton.jit
def _count(counter, scratch, freeze_iter, recomputing):
    """Hand on which of the live forwards this one is, from 1 on, and whether it moves the averages."""
    forwards = tl.load(counter) - recomputing
    live = forwards + 1
    moves = recomputing == 0
    if freeze_iter > 0:
        begun = forwards % (CYCLE_ * freeze_iter)
        live = forwards // (CYCLE_ * freeze_iter) * (freeze_iter + 1) + tl.minimum(begun, freeze_iter + 1) + 1
        moves = moves & (begun < freeze_iter + 1)
    tl.store(scratch, live.to(tl.float32))
    tl.store(scratch + 1, moves.to(tl.float32))


@triton.jit
def _row_at(
    row, group, image, down, right, channel, total, in_image, columns, samples, every, of_set, features,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Return where the first features of probed rows lie, as a column."""
    if PIXELS:
        position = row * every
        index = ((position // of_set).to(tl.int64) * total + total // 2) // samples
        index = tl.minimum(index, total - 1)
        in_place = index % in_image
        place = index // in_image * image + in_place // columns * down + in_place % columns * right
        place += ((group + position % of_set) * features).to(tl.int64) * channel
    else:
        place = row.to(tl.int64) * down + tl.zeros_like(row).to(tl.int64) + group * image
    return place[:, None]


@triton.jit
def _deviations(rows, feature, channel, own_mean, mean, running_mean, there, real):
    """Load rows less their batch's own mean, and less the running mean where padding counts alike."""
    inside = there & real[None, :]
    values = tl.load(rows + (feature.to(tl.int64) * channel)[None, :], inside, other=0).to(tl.float32)
    own = values - tl.load(own_mean + feature, real, other=0).to(tl.float32)[None, :]
    shift = tl.load(mean + feature, real, other=0).to(tl.float32)
    shift -= tl.load(running_mean + feature, real, other=0).to(tl.float32)
    return tl.where(inside, own, 0), tl.where(inside, own + shift[None, :], 0)


@triton.jit
def _of_parts(scratch, missing, sets, parts, SETS: tl.constexpr, PARTS: tl.constexpr):
    """Load what the parts of all sets hold (SETS, PARTS)."""
    group, part = tl.arange(0, SETS)[:, None], tl.arange(0, PARTS)[None, :]
    return tl.load(scratch + group * parts + part, (group < sets) & (part < parts), other=missing)


@triton.jit
def _move(pointers, running, value, weight, inside):
    """Store a running value that a batch's is averaged into; a value that is not finite has no weight."""
    value = tl.where(tl.abs(value) < float("inf"), value, 0)
    tl.store(pointers, (running + weight * (value - running)).to(pointers.dtype.element_ty), inside)
