"""A batch averaged into the running statistics: what whiteners pass on is measured, then all is written.

Where there is one set of one tile, one program does both. Else they are two launches: the first one only reads buffers,
and hands on what all programs of the second must know, so that none of these reads what another writes. The first of
them writes gain, power and counter, and each its own part of the rest.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from ..gain import LARGEST, PROBED_ROWS
from ..tracking import Averaging
from ..windows import PIXEL, Window
from .gain import CONSTANT, CUMULATIVE, FROM_RECENT, FROM_START, count_live, judge
from .launch import PLANS, Launch, Unfit, check_dtypes, padded, parts_of, tiles

__all__ = ["average_in_"]

ROWS = 32
"""Probed rows that a program measures at a time; for more, it would have too few registers."""

CHANNELS = 64
"""Channels that a program takes where each is a set of its own."""

FIELDS = 8
"""Numbers that are handed on of each set, in each of the parts into which measuring it is divided."""

MOST_SETS = 4096
"""Sets that a program judges together."""

WINDOW = "HIGH WIDE STEP_DOWN STEP_RIGHT FAR_DOWN FAR_RIGHT ABOVE BESIDE".split()
"""Constants of kernels: height and width of a window, stride, dilation and padding, each down and right."""

PROBED: tl.constexpr = tl.constexpr(PROBED_ROWS)


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
    """Average in a batch, and count it: one launch for one set of at most 64 features, else two."""
    gain, power = gained or (running_mean, running_mean)
    check_dtypes(x, mean, whitener, running_mean, running_deconv, gain, power)
    if not all(buffer.is_contiguous() for buffer in (running_mean, running_deconv, gain, power)):
        raise Unfit
    plan = _planned(x.shape, x.stride(), row_count, seen, blocks, averaging, gain.dtype if gained else None)
    scratch = torch.empty(plan.scratch, dtype=torch.float32, device=x.device)
    nonfinite = torch.empty((), dtype=torch.bool, device=x.device)
    own_mean, mean, whitener, varies = (value.contiguous() for value in (own_mean, mean, whitener, varies))
    state = running_mean, running_deconv, gain, power, counter, scratch
    if plan.update is None:
        plan.measure(x, own_mean, mean, whitener, *state, varies, nonfinite)
    else:
        plan.measure(x, own_mean, mean, whitener, *state)
        plan.update(mean, whitener, *state, varies, nonfinite)
    return nonfinite


class _Plan(NamedTuple):
    """How a layer's batches of a shape are averaged in.

    Attributes:
        scratch: numbers that are handed on.
        measure, update: the two launches; where one program does everything, there is one.
    """

    scratch: int
    measure: Launch
    update: Launch | None = None


@functools.lru_cache(PLANS)
def _planned(
    shape: torch.Size,
    strides: tuple[int, ...],
    row_count: int,
    seen: Window,
    blocks: Blocks,
    averaging: Averaging,
    dtype: torch.dtype | None,
) -> _Plan:
    """Plan averaging in a batch of images (N, C, H, W); `dtype` is that of gain and power, if these are corrected."""
    sets, features, of_set = blocks.sets, blocks.features, blocks.number // blocks.sets
    windows, across = shape[0] * seen.positions((shape[2], shape[3])), tiles(features)
    if sets > MOST_SETS or windows >= 2**31:
        raise Unfit
    alone, standardises = sets == across == 1, features == 1 and sets > 1
    probed = min(PROBED_ROWS, windows) * of_set if dtype else 1
    rows = parts_of(probed, parts_of(probed, PROBED_ROWS))
    turns = parts_of(rows, ROWS) if alone or standardises else 1
    parts, channels = across * parts_of(rows, ROWS * turns), parts_of(sets, CHANNELS)
    shared = {"WIDTH": CHANNELS if standardises else padded(features), "GAINED": dtype is not None}
    shared["RECOMPUTING"] = averaging.recomputing
    measuring = shared | {"ROWS": ROWS, "TURNS": turns, "FREEZE_ITER": averaging.freeze_iter}
    measuring |= dict(zip(WINDOW, (seen if dtype else PIXEL).numbers, strict=True))
    measuring["INTERLEAVED"] = dtype is not None and blocks.interleaved
    judging = shared | _weighting(averaging, dtype is not None) | _limits(dtype or torch.float32)
    judging |= {"SETS": triton.next_power_of_2(sets), "PARTS": triton.next_power_of_2(parts)}
    images, sizes = [*strides, shape[0], shape[2], shape[3], of_set], [rows, features, sets, parts]
    numbers, scale = [*images, *sizes], (row_count + 1) / max(row_count - 1, 1) / features
    scratch = FIELDS * sets * parts + 2
    if alone:
        both = measuring | judging
        return _Plan(scratch, Launch(_average, (1,), *numbers, scale, warps=8, stages=1, **both))
    kernels = (_measure_channels, _update_channels) if standardises else (_measure, _update)
    grids = [(channels,)] * 2 if standardises else [(parts, sets), (across * across, sets)]
    measure = Launch(kernels[0], grids[0], *numbers, warps=8, stages=1, **measuring)
    return _Plan(scratch, measure, Launch(kernels[1], grids[1], *sizes, scale, warps=8, **judging))


def _weighting(averaging: Averaging, gained: bool) -> dict[str, Any]:
    """Return the constants of how the weight of a batch follows from its number."""
    kind = FROM_RECENT if gained else FROM_START
    if averaging.momentum == 1 or not (averaging.start_corrected or gained):
        kind = CONSTANT
    if averaging.cumulative:
        kind = CUMULATIVE
    return {"WEIGHT": kind.value, "MOMENTUM": averaging.momentum}


def _limits(dtype: torch.dtype) -> dict[str, Any]:
    """Return the most power and the least gain that buffers of a dtype hold."""
    limits = torch.finfo(dtype)
    return {"MOST": min(LARGEST, limits.max), "LEAST": max(LARGEST**-0.5, limits.tiny)}


@triton.jit
def _average(
    x, own_mean, mean, whitener, running_mean, running_deconv, gain, power, counter, scratch, varies, nonfinite,
    image, channel, down, right, count, height, width, of_set, rows, features, sets, parts, scale,
    HIGH: tl.constexpr, WIDE: tl.constexpr, STEP_DOWN: tl.constexpr, STEP_RIGHT: tl.constexpr,
    FAR_DOWN: tl.constexpr, FAR_RIGHT: tl.constexpr, ABOVE: tl.constexpr, BESIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr, FREEZE_ITER: tl.constexpr, RECOMPUTING: tl.constexpr, ROWS: tl.constexpr,
    TURNS: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr, WEIGHT: tl.constexpr, MOMENTUM: tl.constexpr,
    MOST: tl.constexpr, LEAST: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Do what `_measure` does, and when that is done and seen by all threads, what `_update` does."""
    _measure(
        x, own_mean, mean, whitener, running_mean, running_deconv, gain, power, counter, scratch,
        image, channel, down, right, count, height, width, of_set, rows, features, sets, parts,
        HIGH, WIDE, STEP_DOWN, STEP_RIGHT, FAR_DOWN, FAR_RIGHT, ABOVE, BESIDE,
        INTERLEAVED, FREEZE_ITER, RECOMPUTING, ROWS, TURNS, WIDTH, GAINED,
    )  # fmt: skip
    tl.debug_barrier()
    _update(
        mean, whitener, running_mean, running_deconv, gain, power, counter, scratch, varies, nonfinite,
        rows, features, sets, parts, scale,
        RECOMPUTING, WIDTH, GAINED, WEIGHT, MOMENTUM, MOST, LEAST, SETS, PARTS,
    )  # fmt: skip


@triton.jit
def _measure(
    x, own_mean, mean, whitener, running_mean, running_deconv, gain, power, counter, scratch,
    image, channel, down, right, count, height, width, of_set, rows, features, sets, parts,
    HIGH: tl.constexpr, WIDE: tl.constexpr, STEP_DOWN: tl.constexpr, STEP_RIGHT: tl.constexpr,
    FAR_DOWN: tl.constexpr, FAR_RIGHT: tl.constexpr, ABOVE: tl.constexpr, BESIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr, FREEZE_ITER: tl.constexpr, RECOMPUTING: tl.constexpr, ROWS: tl.constexpr,
    TURNS: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr,
):  # fmt: skip
    """Measure what live and running whitener of a set make of some probed rows, in a tile of features."""
    part, group, across = tl.program_id(0), tl.program_id(1), tl.cdiv(features, WIDTH)
    tile, chunk = part % across, part // across
    output = tile * WIDTH + tl.arange(0, WIDTH)
    whitener += group.to(tl.int64) * features * features
    running_deconv += group.to(tl.int64) * features * features
    passed, live_passed = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    squares, norms = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for turn in range(TURNS):
        row = (chunk * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        live, late = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
        for first in range(0, features, WIDTH):
            feature = first + tl.arange(0, WIDTH)
            real, at = feature < features, feature[:, None] * features + output[None, :]
            inside = real[:, None] & (output < features)[None, :]
            matrix = tl.load(whitener + at, inside, other=0)
            once = (chunk + turn == 0).to(tl.float32)
            total += tl.sum(matrix, 0) * once
            if GAINED:
                there, of_group = (row < rows)[:, None] & real[None, :], group * features + feature
                own = _probe(
                    x, image, channel, down, right, count, height, width, of_set, features, row, group, feature, there,
                    HIGH, WIDE, STEP_DOWN, STEP_RIGHT, FAR_DOWN, FAR_RIGHT, ABOVE, BESIDE, INTERLEAVED,
                )  # fmt: skip
                own = tl.where(there, own - tl.load(own_mean + of_group, real, other=0)[None, :], 0)
                shift = tl.load(mean + of_group, real, other=0)
                shift -= tl.load(running_mean + of_group, real, other=0).to(tl.float32)
                live = tl.dot(own, matrix, live, input_precision="tf32x3")
                norms += tl.sum(matrix * matrix, 0) * once
                if first == tile * WIDTH:
                    squares += tl.sum(own * own, 0)
                matrix = tl.load(running_deconv + at, inside, other=0).to(tl.float32)
                late = tl.dot(tl.where(there, own + shift[None, :], 0), matrix, late, input_precision="tf32x3")
        live_passed += tl.sum(live * live, 0)
        passed += tl.sum(late * late, 0)
    field, at = sets * parts, scratch + group * parts + part
    tl.store(at, tl.sum(total, 0))
    if GAINED:
        tl.store(at + field, tl.sum(passed, 0))
        tl.store(at + 2 * field, tl.sum(live_passed, 0))
        tl.store(at + 3 * field, tl.sum(squares, 0))
        tl.store(at + 4 * field, tl.sum(norms, 0))
        if part == 0:
            tl.store(at + 5 * field, tl.load(gain + group).to(tl.float32))
            tl.store(at + 6 * field, tl.load(power + group).to(tl.float32))
            tl.store(at + 7 * field, tl.load(power + sets + group).to(tl.float32))
    if (part == 0) & (group == 0):
        count_live(counter, scratch + 8 * field, FREEZE_ITER, RECOMPUTING)


@triton.jit
def _measure_channels(
    x, own_mean, mean, whitener, running_mean, running_deconv, gain, power, counter, scratch,
    image, channel, down, right, count, height, width, of_set, rows, features, sets, parts,
    HIGH: tl.constexpr, WIDE: tl.constexpr, STEP_DOWN: tl.constexpr, STEP_RIGHT: tl.constexpr,
    FAR_DOWN: tl.constexpr, FAR_RIGHT: tl.constexpr, ABOVE: tl.constexpr, BESIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr, FREEZE_ITER: tl.constexpr, RECOMPUTING: tl.constexpr, ROWS: tl.constexpr,
    TURNS: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr,
):  # fmt: skip
    """Do what `_measure` does for channels of which each is a set of its own."""
    group = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real, at = group < sets, scratch + group
    live = tl.load(whitener + group, real, other=0)
    tl.store(at, live, real)
    if GAINED:
        own_mu, shift = tl.load(own_mean + group, real, other=0), tl.load(mean + group, real, other=0)
        shift -= tl.load(running_mean + group, real, other=0).to(tl.float32)
        squares, late = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
        for turn in range(TURNS):
            row = turn * ROWS + tl.arange(0, ROWS)
            there = (row < rows)[:, None] & real[None, :]
            own = _probe(
                x, image, channel, down, right, count, height, width, of_set, features, row, 0, group, there,
                HIGH, WIDE, STEP_DOWN, STEP_RIGHT, FAR_DOWN, FAR_RIGHT, ABOVE, BESIDE, INTERLEAVED,
            )  # fmt: skip
            own = tl.where(there, own - own_mu[None, :], 0)
            squares += tl.sum(own * own, 0)
            own = tl.where(there, own + shift[None, :], 0)
            late += tl.sum(own * own, 0)
        running = tl.load(running_deconv + group, real, other=0).to(tl.float32)
        tl.store(at + sets, late * running * running, real)
        tl.store(at + 2 * sets, squares * live * live, real)
        tl.store(at + 3 * sets, squares, real)
        tl.store(at + 4 * sets, live * live, real)
        tl.store(at + 5 * sets, tl.load(gain + group, real, other=1).to(tl.float32), real)
        tl.store(at + 6 * sets, tl.load(power + group, real, other=0).to(tl.float32), real)
        tl.store(at + 7 * sets, tl.load(power + sets + group, real, other=0).to(tl.float32), real)
    if tl.program_id(0) == 0:
        count_live(counter, scratch + 8 * sets, FREEZE_ITER, RECOMPUTING)


@triton.jit
def _update(
    mean, whitener, running_mean, running_deconv, gain, power, counter, scratch, varies, nonfinite,
    rows, features, sets, parts, scale,
    RECOMPUTING: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr, WEIGHT: tl.constexpr,
    MOMENTUM: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Average a tile of a set's whitener in, and with the first column of tiles a part of its mean."""
    across, group = tl.cdiv(features, WIDTH), tl.program_id(1)
    weight, of_sets, after, change = judge(
        gain, power, counter, scratch, rows, features, sets, parts, varies, nonfinite, scale,
        (tl.program_id(0) == 0) & (group == 0), RECOMPUTING, GAINED, WEIGHT, MOMENTUM, MOST, LEAST, SETS, PARTS,
    )  # fmt: skip
    here = tl.arange(0, SETS) == group
    feature = tl.program_id(0) // across * WIDTH + tl.arange(0, WIDTH)
    output = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    inside = (feature < features)[:, None] & (output < features)[None, :]
    at = group.to(tl.int64) * features * features + feature[:, None] * features + output[None, :]
    _move(running_deconv + at, whitener + at, inside, tl.sum(tl.where(here, of_sets, 0), 0),
          tl.sum(tl.where(here, change, 0), 0), tl.sum(tl.where(here, after, 0), 0))  # fmt: skip
    at, first = group * features + feature, (feature < features) & (tl.program_id(0) % across == 0)
    _move(running_mean + at, mean + at, first, weight, 1.0, 1.0)


@triton.jit
def _update_channels(
    mean, whitener, running_mean, running_deconv, gain, power, counter, scratch, varies, nonfinite,
    rows, features, sets, parts, scale,
    RECOMPUTING: tl.constexpr, WIDTH: tl.constexpr, GAINED: tl.constexpr, WEIGHT: tl.constexpr,
    MOMENTUM: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr, SETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Do what `_update` does for channels of which each is a set of its own: all are judged, and a few are written."""
    weight, of_sets, after, change = judge(
        gain, power, counter, scratch, rows, features, sets, parts, varies, nonfinite, scale,
        tl.program_id(0) == 0, RECOMPUTING, GAINED, WEIGHT, MOMENTUM, MOST, LEAST, SETS, PARTS,
    )  # fmt: skip
    group = tl.arange(0, SETS)
    mine = (group < sets) & (group // WIDTH == tl.program_id(0))
    _move(running_deconv + group, whitener + group, mine, of_sets, change, after)
    _move(running_mean + group, mean + group, mine, weight, 1.0, 1.0)


@triton.jit
def _probe(
    x, image, channel, down, right, count, height, width, of_set, features, row, group, feature, there,
    HIGH: tl.constexpr, WIDE: tl.constexpr, STEP_DOWN: tl.constexpr, STEP_RIGHT: tl.constexpr,
    FAR_DOWN: tl.constexpr, FAR_RIGHT: tl.constexpr, ABOVE: tl.constexpr, BESIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load features of probed rows, in `_probed_rows`'s order of windows and blocks; zero where not `there`."""
    columns = (width + 2 * BESIDE - FAR_RIGHT * (WIDE - 1) - 1) // STEP_RIGHT + 1
    in_image = ((height + 2 * ABOVE - FAR_DOWN * (HIGH - 1) - 1) // STEP_DOWN + 1) * columns
    total = count * in_image
    probed = tl.minimum(total, PROBED)
    position = row * tl.cdiv(probed * of_set, PROBED)
    window, half = position // of_set, total // 2
    index = window * (total // probed) + half // probed + (window * (total % probed) + half % probed) // probed
    index = tl.minimum(index, total - 1)
    top, left = index % in_image // columns * STEP_DOWN, index % in_image % columns * STEP_RIGHT
    block = group + position % of_set
    of_block, of_feature = (1, of_set) if INTERLEAVED else (features, 1)
    place = block[:, None] * of_block + feature[None, :] * of_feature
    at = ((index // in_image).to(tl.int64) * image)[:, None]
    if HIGH * WIDE == 1:
        at += (top.to(tl.int64) * down + left.to(tl.int64) * right)[:, None]
    else:
        top = top[:, None] - ABOVE + place // WIDE % HIGH * FAR_DOWN
        left = left[:, None] - BESIDE + place % WIDE * FAR_RIGHT
        there &= (top >= 0) & (top < height) & (left >= 0) & (left < width)
        at += top.to(tl.int64) * down + left.to(tl.int64) * right
    return tl.load(x + at + (place // (HIGH * WIDE)).to(tl.int64) * channel, there, other=0).to(tl.float32)


@triton.jit
def _move(running, value, inside, weight, change, scale):
    """Average values times a scale into running ones, changed by a factor; those of weight zero stay as they are."""
    weight += tl.zeros(inside.shape, tl.float32)
    inside &= weight > 0
    before, batch = tl.load(running, inside).to(tl.float32), tl.load(value, inside)
    tl.store(running, ((1 - weight) * change * before + weight * scale * batch).to(running.dtype.element_ty), inside)
