"""Mean and covariance of the rows of sampled pixels, and the gradient through them, read and added where pixels lie.

A row is a run of F channels at a pixel; any strides will do. Rows are divided into chunks: a program finds the mean of
a chunk and the products of deviations from it, and then all chunks are joined (Chan, Golub and LeVeque, Updating
formulae and a pairwise algorithm for computing sample variances, 1979). Rows are counted from a pivot, the first of
their set, so that means far larger than the deviations cost no digits.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from ..formats import overlaps
from ..windows import Sampling
from .launch import PLANS, Launch, Unfit, check_dtypes, padded, parts_of, tiles

__all__ = ["add_moments_gradient_", "sampled_moments"]

ROWS = 32
"""Rows that a program takes at a time; for 64, GPUs of compute capability 8.0 have too few registers."""

WARPS = {16: 4, 32: 8, 64: 8}
"""A program's, by the width of its tiles; fewer would have too few registers."""

GRADIENT = 1024
"""Numbers of the gradient that a program computes; for more, it would have too few registers."""

TURNS = 2
"""Times that a program takes rows, at the least: a smaller chunk costs more to join than it saves."""

CHANNELS = 64
"""Channels that a program takes where each is a set of its own."""

PROGRAMS = 264
"""Programs that are enough: two for each multiprocessor of a large GPU."""

SCRATCH = 2**21
"""Most numbers that all chunks may hold, 8 MB; one chunk may hold more."""

JOINED, PATCH = 32, 16
"""Chunks, and features either way, that a program joins at a time."""


class _Rows(NamedTuple):
    """How the rows of a set are numbered: image by image, pixel by pixel of a grid, block by block of a pixel.

    Attributes:
        number: R.
        blocks: that a set has at a pixel.
        pixels: of an image that are sampled.
        columns: of their grid.
    """

    number: int
    blocks: int
    pixels: int
    columns: int


def sampled_moments(x: Tensor, sampling: Sampling, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Compute mean (S, F) and covariance (S, F, F), both float32, in two launches."""
    check_dtypes(x)
    plan = _plan_moments(x.shape, x.stride(), sampling, blocks)
    like: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    mean, cov, parts = (torch.empty(shape, **like) for shape in plan.shapes)
    plan.compute(x, mean, parts)
    plan.join(parts, mean, cov)
    return mean, cov


def add_moments_gradient_(
    grad_x: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, sampling: Sampling, blocks: Blocks
) -> None:
    """Add to grad_x, in place, what reaches x through its moments, in one launch."""
    check_dtypes(grad_x, x, mean, grad_mean, grad_cov)
    add = _plan_gradient(x.shape, grad_x.stride(), x.stride(), sampling, blocks)
    add(grad_x, x, mean.contiguous(), grad_mean.contiguous(), grad_cov.contiguous())


class _Plan(NamedTuple):
    """How moments are computed: launches, for chunks of rows and for all of them, and what memory they write to.

    `shapes` are those of mean, covariance and what chunks hold.
    """

    compute: Launch
    join: Launch
    shapes: tuple[tuple[int, ...], ...]


@functools.lru_cache(PLANS)
def _plan_moments(shape: torch.Size, strides: tuple[int, ...], sampling: Sampling, blocks: Blocks) -> _Plan:
    """Plan the moments of images (N, C, H, W)."""
    rows = _rows(shape, sampling, blocks)
    plan = _plan_channels if _standardises(blocks) else _plan_blocks
    return plan(rows, _steps(strides, sampling), blocks.sets, blocks.features)


@functools.lru_cache(PLANS)
def _plan_gradient(
    shape: torch.Size, grad_strides: tuple[int, ...], strides: tuple[int, ...], sampling: Sampling, blocks: Blocks
) -> Launch:
    """Plan the addition to the gradient of images (N, C, H, W)."""
    rows, sets, features = _rows(shape, sampling, blocks), blocks.sets, blocks.features
    if overlaps(shape, grad_strides):
        raise Unfit("the gradient of the input overlaps itself in memory")
    numbers = [*_steps(grad_strides, sampling), *_steps(strides, sampling), *rows]
    if _standardises(blocks):
        grid = [parts_of(rows.number, ROWS), parts_of(sets, CHANNELS)]
        return Launch(_add_to_channels, grid, *numbers, sets, ROWS=ROWS, WIDTH=CHANNELS)
    width, height = padded(features), GRADIENT // padded(features)
    grid = [parts_of(rows.number, height), tiles(features), sets]
    return Launch(_add_to_blocks, grid, *numbers, features, warps=WARPS[width], ROWS=height, WIDTH=width)


def _plan_blocks(rows: _Rows, steps: tuple[int, ...], sets: int, features: int) -> _Plan:
    across, width = tiles(features), padded(features)
    chunks, length = _chunks(rows, sets * across * (across + 1) // 2, sets * features * (features + 1))
    grid, numbers = [chunks, across, across * sets], [*steps, *rows, features, length]
    constants = {"ROWS": ROWS, "WIDTH": width, "ONE": across == 1}
    compute = Launch(_blocks_of_chunk, grid, *numbers, warps=WARPS[width], **constants)
    across, numbers = parts_of(features, PATCH), [rows.number, features, chunks, length]
    join = Launch(_join_blocks, [across, across, sets], *numbers, warps=8, CHUNKS=JOINED, WIDTH=PATCH)
    return _Plan(compute, join, ((sets, features), (sets, features, features), (chunks, sets, features + 1, features)))


def _plan_channels(rows: _Rows, steps: tuple[int, ...], sets: int, features: int) -> _Plan:
    across = parts_of(sets, CHANNELS)
    chunks, length = _chunks(rows, across, 2 * sets)
    numbers = [*steps, *rows, sets, length]
    compute = Launch(_channels_of_chunk, [chunks, across], *numbers, ROWS=ROWS, WIDTH=CHANNELS)
    join = Launch(_join_channels, [across], rows.number, sets, chunks, length, CHUNKS=JOINED, WIDTH=CHANNELS)
    return _Plan(compute, join, ((sets, features), (sets, features, features), (chunks, 2, sets)))


def _rows(shape: torch.Size, sampling: Sampling, blocks: Blocks) -> _Rows:
    """Number the rows of images (N, C, H, W); raise `Unfit` where they are not runs of channels at pixels of a grid."""
    window, (top, left) = sampling.window, sampling.offset
    count, channels, height, width = shape
    if not window.pointwise or sampling.flat or not blocks.pixels or blocks.interleaved:
        raise Unfit
    of_set = blocks.number // blocks.sets
    columns = max(parts_of(width - left, window.stride[1]), 0)
    pixels = max(parts_of(height - top, window.stride[0]), 0) * columns
    number = parts_of(count, sampling.images) * pixels * of_set
    if not 0 < number < 2**30 or blocks.number * blocks.features != channels:
        raise Unfit
    return _Rows(number, of_set, pixels, columns)


def _steps(strides: tuple[int, ...], sampling: Sampling) -> tuple[int, int, int, int, int]:
    """Return where the first sampled pixel lies, and how far it is to the next image, row, column and channel."""
    (image, channel, row, column), (down, right) = strides, sampling.window.stride
    top, left = sampling.offset
    return top * row + left * column, sampling.images * image, down * row, right * column, channel


def _standardises(blocks: Blocks) -> bool:
    """Tell whether every channel is a set of its own."""
    return blocks.groups > 1 and blocks.features == 1


def _chunks(rows: _Rows, programs: int, numbers: int) -> tuple[int, int]:
    """Divide rows into chunks that take so many programs and hold so many numbers each.

    Returns:
        how many chunks, and how many rows each has; the last may have fewer.
    """
    most = max(min(PROGRAMS // programs, SCRATCH // numbers), 1)
    length = max(parts_of(rows.number, most * ROWS), TURNS) * ROWS
    return parts_of(rows.number, length), length


@triton.jit
def _blocks_of_chunk(
    x, mean, parts, start, image, down, right, channel, count, blocks, pixels, columns, features, length,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ONE: tl.constexpr,
):
    """Find a chunk's mean, less the pivot, and a tile on or above the diagonal of its products of deviations.

    parts: (chunks, S, F + 1, F), the mean in the last row. mean: (S, F), which is given the pivot.
    """
    chunk, tile, across = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    other, group, sets = tl.program_id(2) % across, tl.program_id(2) // across, tl.num_programs(2) // across
    if tile > other:
        return
    feature, partner = tile * WIDTH + tl.arange(0, WIDTH), other * WIDTH + tl.arange(0, WIDTH)
    real, real_partner = feature < features, partner < features
    along, along_partner = feature.to(tl.int64) * channel, partner.to(tl.int64) * channel
    x += start
    first = x + _block_at(0, group, blocks, features, channel)
    pivot = tl.load(first + along, real, other=0).to(tl.float32)
    pivot_partner = tl.load(first + along_partner, real_partner, other=0).to(tl.float32)
    centre, centre_partner = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    products = tl.zeros((WIDTH, WIDTH), tl.float32)
    begin = chunk * length
    for top in range(begin, tl.minimum(begin + length, count), ROWS):
        row = top + tl.arange(0, ROWS)
        place = _pixel_at(row // blocks, pixels, columns, image, down, right)
        there, place = (row < count)[:, None], place + _block_at(row % blocks, group, blocks, features, channel)
        number = tl.minimum(count - top, ROWS).to(tl.float32)
        own, own_mean = _deviations(x + place[:, None] + along[None, :], there & real[None, :], pivot, number)
        if ONE:
            its, its_mean = own, own_mean
        else:
            inside = there & real_partner[None, :]
            its, its_mean = _deviations(x + place[:, None] + along_partner[None, :], inside, pivot_partner, number)
        before = (top - begin).to(tl.float32)
        share, shift, shift_partner = number / (before + number), own_mean - centre, its_mean - centre_partner
        products += before * share * (shift[:, None] * shift_partner[None, :])
        products = tl.dot(tl.trans(own), its, products, input_precision="tf32x3")
        centre += share * shift
        centre_partner += share * shift_partner
    parts += (chunk * sets + group).to(tl.int64) * (features + 1) * features
    tl.store(parts + feature[:, None] * features + partner[None, :], products, real[:, None] & real_partner[None, :])
    diagonal = real & (tile == other)
    tl.store(parts + features * features + feature, centre, diagonal)
    tl.store(mean + group * features + feature, pivot, diagonal & (chunk == 0))


@triton.jit
def _join_blocks(parts, mean, cov, count, features, chunks, length, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Join what chunks hold, (chunks, S, F + 1, F), to a tile of the covariance, and add the mean to the pivot.

    Pairs below the diagonal are read from above it, so that the covariance is symmetric to the last bit.
    """
    group, sets = tl.program_id(2), tl.num_programs(2)
    feature = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    partner = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real, real_partner = feature < features, partner < features
    pair = tl.minimum(feature[:, None], partner[None, :]) * features + tl.maximum(feature[:, None], partner[None, :])
    real_pair = real[:, None] & real_partner[None, :]
    parts += group.to(tl.int64) * (features + 1) * features
    part = sets.to(tl.int64) * (features + 1) * features
    means = parts + features * features
    centre, centre_partner = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        share = _rows_of(chunk, length, count)[:, None] / count
        centre += tl.sum(share * _of_chunks(means, chunk, chunks, part, feature, real), 0)
        centre_partner += tl.sum(share * _of_chunks(means, chunk, chunks, part, partner, real_partner), 0)
    total = tl.zeros((WIDTH, WIDTH), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        own = _of_chunks(means, chunk, chunks, part, feature, real) - centre[None, :]
        its = _of_chunks(means, chunk, chunks, part, partner, real_partner) - centre_partner[None, :]
        place, there = (chunk * part)[:, None, None] + pair[None, :, :], (chunk < chunks)[:, None, None]
        products = tl.load(parts + place, there & real_pair[None, :, :], other=0)
        number = _rows_of(chunk, length, count)[:, None, None]
        total += tl.sum(products + number * (own[:, :, None] * its[:, None, :]), 0)
    cov += group.to(tl.int64) * features * features
    tl.store(cov + feature[:, None] * features + partner[None, :], total / count, real_pair)
    mean += group * features + feature
    once = real & (tl.program_id(1) == 0)
    tl.store(mean, tl.load(mean, once) + centre, once)


@triton.jit
def _channels_of_chunk(
    x, mean, parts, start, image, down, right, channel, count, blocks, pixels, columns, channels, length,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Find means, less the pivot, and squared deviations of a chunk's channels: parts (chunks, 2, S).

    mean: (S, 1), which is given the pivot.
    """
    chunk, here = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real, along = here < channels, here.to(tl.int64) * channel
    x += start
    pivot = tl.load(x + along, real, other=0).to(tl.float32)
    centre, squares = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    begin = chunk * length
    for top in range(begin, tl.minimum(begin + length, count), ROWS):
        row = top + tl.arange(0, ROWS)
        place = _pixel_at(row, pixels, columns, image, down, right)
        number = tl.minimum(count - top, ROWS).to(tl.float32)
        inside = (row < count)[:, None] & real[None, :]
        own, own_mean = _deviations(x + place[:, None] + along[None, :], inside, pivot, number)
        before = (top - begin).to(tl.float32)
        share, shift = number / (before + number), own_mean - centre
        squares += tl.sum(own * own, 0) + before * share * (shift * shift)
        centre += share * shift
    parts += 2 * chunk * channels + here
    tl.store(parts, centre, real)
    tl.store(parts + channels, squares, real)
    tl.store(mean + here, pivot, real & (chunk == 0))


@triton.jit
def _join_channels(parts, mean, cov, count, channels, chunks, length, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Join what chunks hold of channels, (chunks, 2, S), to variances, and add means to pivots."""
    here = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = here < channels
    part = 2 * channels
    centre, total = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        share = _rows_of(chunk, length, count)[:, None] / count
        centre += tl.sum(share * _of_chunks(parts, chunk, chunks, part, here, real), 0)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        own = _of_chunks(parts, chunk, chunks, part, here, real) - centre[None, :]
        squares = _of_chunks(parts + channels, chunk, chunks, part, here, real)
        total += tl.sum(squares + _rows_of(chunk, length, count)[:, None] * (own * own), 0)
    tl.store(cov + here, total / count, real)
    tl.store(mean + here, tl.load(mean + here, real) + centre, real)


@triton.jit
def _add_to_blocks(
    grad_x, x, mean, grad_mean, grad_cov, grad_start, grad_image, grad_down, grad_right, grad_channel,
    start, image, down, right, channel, count, blocks, pixels, columns, features,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Add (2 (rows - mean) grad_cov + grad_mean) / R to a tile of the sampled rows of grad_x."""
    row, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2)
    output = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there, real_output = (row < count)[:, None], output < features
    place = _pixel_at(row // blocks, pixels, columns, image, down, right)
    place += _block_at(row % blocks, group, blocks, features, channel)
    mean += group * features
    grad_cov += group.to(tl.int64) * features * features
    grad = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, features, WIDTH):
        feature = first + tl.arange(0, WIDTH)
        real = feature < features
        along = feature.to(tl.int64) * channel
        own = tl.load(x + start + place[:, None] + along[None, :], there & real[None, :], other=0).to(tl.float32)
        own -= tl.load(mean + feature, real, other=0).to(tl.float32)[None, :]
        matrix = grad_cov + feature[:, None] * features + output[None, :]
        matrix = tl.load(matrix, real[:, None] & real_output[None, :], other=0).to(tl.float32)
        grad = tl.dot(own, matrix, grad, input_precision="tf32x3")
    constant = tl.load(grad_mean + group * features + output, real_output, other=0).to(tl.float32)
    place = _pixel_at(row // blocks, pixels, columns, grad_image, grad_down, grad_right)
    place += _block_at(row % blocks, group, blocks, features, grad_channel)
    grad_x += grad_start + place[:, None] + (output.to(tl.int64) * grad_channel)[None, :]
    _add_(grad_x, (2 * grad + constant[None, :]) / count, there & real_output[None, :])


@triton.jit
def _add_to_channels(
    grad_x, x, mean, grad_mean, grad_cov, grad_start, grad_image, grad_down, grad_right, grad_channel,
    start, image, down, right, channel, count, blocks, pixels, columns, channels,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Do what `_add_to_blocks` does where every channel is a set of its own."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real, along = here < channels, here.to(tl.int64)
    inside = (row < count)[:, None] & real[None, :]
    place = _pixel_at(row, pixels, columns, image, down, right)[:, None] + (along * channel)[None, :]
    own = tl.load(x + start + place, inside, other=0).to(tl.float32)
    own -= tl.load(mean + here, real, other=0).to(tl.float32)[None, :]
    slope = tl.load(grad_cov + here, real, other=0).to(tl.float32)
    constant = tl.load(grad_mean + here, real, other=0).to(tl.float32)
    place = _pixel_at(row, pixels, columns, grad_image, grad_down, grad_right)[:, None]
    grad_x += grad_start + place + (along * grad_channel)[None, :]
    _add_(grad_x, (2 * own * slope[None, :] + constant[None, :]) / count, inside)


@triton.jit
def _pixel_at(pixel, pixels, columns, image, down, right):
    """Return how far sampled pixels are from the first one."""
    place = pixel % pixels
    along = (place // columns).to(tl.int64) * down + (place % columns).to(tl.int64) * right
    return (pixel // pixels).to(tl.int64) * image + along


@triton.jit
def _block_at(block, group, blocks, features, channel):
    """Return how far blocks of a set are from the first channel of their pixel."""
    return ((group * blocks + block) * features).to(tl.int64) * channel


@triton.jit
def _deviations(pointers, inside, pivot, number):
    """Load rows and return the deviations from their mean, and that mean less the pivot; both 0 outside."""
    values = tl.load(pointers, inside, other=0).to(tl.float32)
    values = tl.where(inside, values - pivot[None, :], 0)
    mean = tl.sum(values, 0) / number
    return tl.where(inside, values - mean[None, :], 0), mean


@triton.jit
def _rows_of(chunk, length, count):
    """Return the rows of chunks; 0 beyond the last."""
    return tl.maximum(tl.minimum(count - chunk * length, length), 0).to(tl.float32)


@triton.jit
def _of_chunks(values, chunk, chunks, part, index, real):
    """Load what chunks, each of so many numbers, hold at an index; 0 beyond the last."""
    place = chunk.to(tl.int64)[:, None] * part + index[None, :]
    return tl.load(values + place, (chunk < chunks)[:, None] & real[None, :], other=0)


@triton.jit
def _add_(pointers, values, inside):
    """Add to what the pointers lead to, in float32, and round once."""
    total = tl.load(pointers, inside, other=0).to(tl.float32) + values
    tl.store(pointers, total.to(pointers.dtype.element_ty), inside)
