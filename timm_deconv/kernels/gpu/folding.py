"""Whitening folded into weight and bias in one launch, and the gradients of all that went in, in one or two.

An output has N rows of F features each: one for every block of a window, or for every block and kernel position of
blocks of pixels. Features are cut into T tiles. A weight of single channels, each with a whitener of its own, is
multiplied element by element.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from ..formats import is_channels_last, memory_format
from .launch import PLANS, Launch, Unfit, check_dtypes, padded, parts_of, tiles

__all__ = ["fold_whitening", "fold_whitening_backward"]

FEW_ROWS, ROWS = 16, 32
"""Rows of a weight that a program multiplies at once: few of them where more would take too many registers."""

MOST_FEATURES = 512
"""Features up to which rows are multiplied here; the product of larger matrices is better left to libraries."""

PROGRAMS = 256
"""Programs that are enough to fill a GPU: rows are split among so many."""

ALONE = 8
"""Tiles of rows that one program takes alone, which saves the launch that adds parts."""

ELEMENTS = 1024
"""Elements of single channels that a program multiplies at once."""

CHUNK, PARTS = 128, 32
"""Elements of a matrix that a program adds, and parts that it loads at once."""


class _Rows(NamedTuple):
    """Outputs of a set, the rows of each, positions of the kernel, channels of a group, and features of a row."""

    outputs: int
    of_output: int
    positions: int
    channels: int
    features: int


def fold_whitening(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    whitener: Tensor,
    blocks: Blocks,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Return weight w D and bias b - w D mu, in one launch."""
    check_dtypes(weight, bias, mean, whitener)
    weight = _dense(weight)
    launch = _plan_folding(weight.shape, is_channels_last(weight), blocks, channels_last)
    folded = torch.empty_like(weight, dtype=dtype, memory_format=memory_format(channels_last))
    folded_bias = weight.new_empty(len(weight), dtype=dtype)
    given = [weight, None if bias is None else bias.contiguous(), mean.contiguous(), whitener.contiguous()]
    launch(*given, folded, folded_bias)
    return folded, folded_bias


@functools.lru_cache(PLANS)
def _plan_folding(shape: torch.Size, last: bool, blocks: Blocks, folded_last: bool) -> Launch:
    """Plan folding into a weight (O, C, h, w): whether it, and the folded one, is in channels_last alone."""
    rows = _rows(shape, blocks)
    if _of_single_channels(blocks):
        positions = _power_of_two(rows.positions)
        outputs = max(ELEMENTS // positions, 1)
        grid, sizes = [parts_of(shape[0], outputs)], [shape[0], rows.outputs, rows.positions]
        return Launch(_fold_channels, grid, *sizes, OUTPUTS=outputs, POSITIONS=positions)
    height = FEW_ROWS if tiles(rows.features) == 1 else ROWS
    outputs = max(height // rows.of_output, 1)
    grid, formats = [parts_of(rows.outputs, outputs), blocks.sets], {"LAST": last, "FOLDED_LAST": folded_last}
    return Launch(_fold, grid, *rows, outputs, ROWS=height, **formats, **_tiling(blocks))


def fold_whitening_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    whitener: Tensor,
    blocks: Blocks,
    with_statistics: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of weight, mean and whitener, in two launches; in one if rows are few, or one gradient."""
    check_dtypes(grad_weight, grad_bias, weight, mean, whitener)
    grad_weight, weight, whitener = _dense(grad_weight), _dense(weight), whitener.contiguous()
    formats = is_channels_last(grad_weight), is_channels_last(weight)
    plan = _plan_gradients(weight.shape, *formats, blocks, with_statistics)
    own, results = torch.empty_like(weight), [torch.empty_like(mean), torch.empty_like(whitener)]
    parts = [mean.new_empty(shape) for shape in plan.parts] or results
    plan.compute(grad_weight, grad_bias.contiguous(), weight, mean.contiguous(), whitener, own, *parts)
    if plan.add is not None:
        plan.add(*parts, whitener, *results)
    return own, results if with_statistics else []


class _Gradients(NamedTuple):
    """How gradients are computed: a launch for rows and, if several programs make parts of those of the statistics, one
    that adds them.

    Attributes:
        parts: the shapes of these, of D mu and D.
    """

    compute: Launch
    add: Launch | None = None
    parts: tuple[tuple[int, ...], ...] = ()


@functools.lru_cache(PLANS)
def _plan_gradients(
    shape: torch.Size, grad_last: bool, last: bool, blocks: Blocks, with_statistics: bool
) -> _Gradients:
    """Plan the gradients of what is folded into a weight (O, C, h, w); see `_plan_folding`."""
    rows, sets = _rows(shape, blocks), blocks.sets
    if _of_single_channels(blocks):
        elements = min(_power_of_two(rows.outputs * rows.positions), ELEMENTS)
        grid, sizes = [parts_of(sets, ELEMENTS // elements)], [sets, rows.outputs, rows.positions]
        constants = {"STATISTICS": with_statistics, "SETS": ELEMENTS // elements, "ELEMENTS": elements}
        return _Gradients(Launch(_fold_channels_backward, grid, *sizes, **constants))
    count, (splits, length) = tiles(rows.features), _splits(rows, blocks)
    alone, grid = splits == count == 1, [splits, (1 + with_statistics) * count**2, sets]
    constants = {"ROWS": FEW_ROWS, "ALONE": alone, "GRAD_LAST": grad_last, "LAST": last, **_tiling(blocks)}
    compute = Launch(_fold_backward, grid, *rows, length, **constants)
    if alone or not with_statistics:
        return _Gradients(compute)
    features = rows.features
    grid = [parts_of(features**2, CHUNK) + count, sets]
    constants = {"TILE": padded(features), "TILES": count, "CHUNK": CHUNK, "PARTS": PARTS}
    parts = (sets, splits, features), (sets, splits, features, features)
    return _Gradients(compute, Launch(_add_parts, grid, splits, features, **constants), parts)


def _rows(shape: torch.Size, blocks: Blocks) -> _Rows:
    """Describe the rows of a weight (O, C, h, w); `Unfit` where too long, or interleaved as in published layers."""
    if blocks.interleaved or blocks.features > MOST_FEATURES or shape.numel() >= 2**31:
        raise Unfit
    outputs, channels, height, width = shape
    positions = height * width
    of_output = channels * positions // blocks.features
    return _Rows(outputs // blocks.sets, of_output, positions, channels, blocks.features)


def _splits(rows: _Rows, blocks: Blocks) -> tuple[int, int]:
    """Return into how many parts the rows of a set are split, and how many tiles of rows each has."""
    number = parts_of(rows.outputs * rows.of_output, FEW_ROWS)
    if number <= ALONE:
        return 1, number
    length = parts_of(number, max(PROGRAMS // (tiles(rows.features) ** 2 * blocks.sets), 1))
    return parts_of(number, length), length


def _of_single_channels(blocks: Blocks) -> bool:
    return blocks.features == 1 and blocks.groups > 1


def _tiling(blocks: Blocks) -> dict[str, Any]:
    """Return how kernels of rows cut features, and the warps and stages for which there are registers enough."""
    count = tiles(blocks.features)
    warps, stages = (4, 2) if count == 1 else (8, 1)
    constants = {"PIXELS": blocks.pixels, "TILE": padded(blocks.features), "TILES": count}
    return {"warps": warps, "stages": stages, **constants}


def _dense(weight: Tensor) -> Tensor:
    """Return a weight in channels_last, or contiguous."""
    return weight if is_channels_last(weight) else weight.contiguous()


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


@triton.jit
def _at(rows, feature, shape, LAST: tl.constexpr, PIXELS: tl.constexpr):
    """Return where features of rows stand in a weight, and whether they do: (rows, features) both."""
    output, row, there = rows
    positions, channels, features = shape
    start = output * (channels * positions)
    index = row[:, None] * features + feature[None, :]
    channel, position = index // positions, index % positions
    if PIXELS:
        channel = (row // positions)[:, None] * features + feature[None, :]
        position = (row % positions)[:, None]
    at = position * channels + channel if LAST else channel * positions + position
    return start[:, None] + at, there[:, None] & (feature < features)[None, :]


@triton.jit
def _tile_of_matrix(matrix, row, column, features):
    inside = (row < features)[:, None] & (column < features)[None, :]
    return tl.load(matrix + row[:, None] * features + column[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def _fold(
    weight, bias, mean, whitener, folded, folded_bias, outputs, of_output, positions, channels, features, of_program,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, LAST: tl.constexpr,
    FOLDED_LAST: tl.constexpr,
):
    """Multiply the rows of some outputs of a set by D, and take the products' means from the bias."""
    shape = (positions, channels, features)
    first, set_index = tl.program_id(0) * of_program, tl.program_id(1)
    here = tl.minimum(of_program, outputs - first)
    first += set_index * outputs
    mean += set_index * features
    whitener += set_index * features * features
    slot, of_tile = tl.arange(0, ROWS), tl.arange(0, TILE)
    shift = tl.zeros((ROWS,), tl.float32)
    for start in range(0, here * of_output, ROWS):
        output = (start + slot) // of_output
        rows = (first + output, (start + slot) % of_output, output < here)
        of_rows = tl.zeros((ROWS,), tl.float32)
        for i in range(TILES):
            column = i * TILE + of_tile
            product = tl.zeros((ROWS, TILE), tl.float32)
            for k in range(TILES):
                feature = k * TILE + of_tile
                at, inside = _at(rows, feature, shape, LAST, PIXELS)
                values = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
                matrix = _tile_of_matrix(whitener, feature, column, features)
                product = tl.dot(values, matrix, product, input_precision="tf32x3")
            mu = tl.load(mean + column, mask=column < features, other=0).to(tl.float32)
            of_rows += tl.sum(product * mu[None, :], 1)
            at, inside = _at(rows, column, shape, FOLDED_LAST, PIXELS)
            tl.store(folded + at, product, mask=inside)
        shift += tl.sum(tl.where(output[:, None] == slot[None, :], of_rows[:, None], 0), 0)
    there = slot < here
    if bias is not None:
        shift -= tl.load(bias + first + slot, mask=there, other=0).to(tl.float32)
    tl.store(folded_bias + first + slot, -shift, mask=there)


@triton.jit
def _less_mean(grad, of_bias, mean, rows, feature, shape, LAST: tl.constexpr, PIXELS: tl.constexpr):
    """Load G, the gradient of the folded weight less that of the bias times the mean: (rows, features)."""
    mu = tl.load(mean + feature, mask=feature < shape[2], other=0).to(tl.float32)
    at, inside = _at(rows, feature, shape, LAST, PIXELS)
    return tl.load(grad + at, mask=inside, other=0).to(tl.float32) - of_bias * mu[None, :]


@triton.jit
def _rows_of_tile(index, first, outputs, of_output, grad_bias, ROWS: tl.constexpr):
    """Return the rows of a tile, and the gradient of the bias of each: (rows, 1)."""
    place = index * ROWS + tl.arange(0, ROWS)
    output = place // of_output
    there = output < outputs
    of_bias = tl.load(grad_bias + first + output, mask=there, other=0).to(tl.float32)
    return (first + output, place % of_output, there), of_bias[:, None]


@triton.jit
def _fold_backward(
    grad, grad_bias, weight, mean, whitener, own, shifts, matrices, outputs, of_output, positions, channels, features,
    tiles_each,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, GRAD_LAST: tl.constexpr,
    LAST: tl.constexpr, ALONE: tl.constexpr,
):
    """Compute for some rows of a set, in the first T^2 programs, tile i of the gradient G D^T of the weight in every
    T-th tile of rows; in others the part w_i^T G_k of tile (i, k) of D's gradient, and that of D mu, negated."""
    shape = (positions, channels, features)
    split, tile, set_index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, k = tile // TILES % TILES, tile % TILES
    first = set_index * outputs
    mean += set_index * features
    whitener += set_index * features * features
    of_tile = tl.arange(0, TILE)
    feature, column = i * TILE + of_tile, k * TILE + of_tile
    begin, end = split * tiles_each, (split + 1) * tiles_each
    if tile < TILES * TILES:
        for index in range(begin + k, end, TILES):
            rows, of_bias = _rows_of_tile(index, first, outputs, of_output, grad_bias, ROWS)
            total = tl.zeros((ROWS, TILE), tl.float32)
            for j in range(TILES):
                other = j * TILE + of_tile
                grads = _less_mean(grad, of_bias, mean, rows, other, shape, GRAD_LAST, PIXELS)
                turned = tl.trans(_tile_of_matrix(whitener, feature, other, features))
                total = tl.dot(grads, turned, total, input_precision="tf32x3")
            at, inside = _at(rows, feature, shape, LAST, PIXELS)
            tl.store(own + at, total, mask=inside)
    else:
        products, shift = tl.zeros((TILE, TILE), tl.float32), tl.zeros((TILE,), tl.float32)
        for index in range(begin, end):
            rows, of_bias = _rows_of_tile(index, first, outputs, of_output, grad_bias, ROWS)
            grads = _less_mean(grad, of_bias, mean, rows, column, shape, GRAD_LAST, PIXELS)
            at, inside = _at(rows, feature, shape, LAST, PIXELS)
            values = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
            products = tl.dot(tl.trans(values), grads, products, input_precision="tf32x3")
            shift += tl.sum(values * of_bias, 0)
        part = set_index * tl.num_programs(0) + split
        inside = (feature < features)[:, None] & (column < features)[None, :]
        at = part.to(tl.int64) * features * features + feature[:, None] * features + column[None, :]
        tl.store(matrices + at, products, mask=inside)
        if ALONE:
            matrix = _tile_of_matrix(whitener, feature, column, features)
            tl.store(shifts + part * features + column, -tl.sum(shift[:, None] * matrix, 0), mask=column < features)
        elif k == 0:
            tl.store(shifts + part * features + feature, shift, mask=feature < features)


@triton.jit
def _add_parts(
    shifts, matrices, whitener, grad_mean, grad_whitener, parts, features,
    TILE: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):
    """Add parts of the gradient of D, some elements of it; the last programs those of D mu, times D for that of mu."""
    chunk, set_index = tl.program_id(0), tl.program_id(1)
    elements = features * features
    chunks = tl.cdiv(elements, CHUNK)
    first = set_index.to(tl.int64) * parts
    part = tl.arange(0, PARTS)
    if chunk < chunks:
        element = chunk * CHUNK + tl.arange(0, CHUNK)
        total = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, parts, PARTS):
            inside = (start + part < parts)[:, None] & (element < elements)[None, :]
            at = (first + start + part)[:, None] * elements + element[None, :]
            total += tl.sum(tl.load(matrices + at, mask=inside, other=0), 0)
        tl.store(grad_whitener + set_index * elements + element, total, mask=element < elements)
    else:
        column = (chunk - chunks) * TILE + tl.arange(0, TILE)
        of_mean = tl.zeros((TILE,), tl.float32)
        for i in range(TILES):
            feature = i * TILE + tl.arange(0, TILE)
            shift = tl.zeros((TILE,), tl.float32)
            for start in range(0, parts, PARTS):
                inside = (start + part < parts)[:, None] & (feature < features)[None, :]
                at = (first + start + part)[:, None] * features + feature[None, :]
                shift += tl.sum(tl.load(shifts + at, mask=inside, other=0), 0)
            matrix = _tile_of_matrix(whitener + set_index * elements, feature, column, features)
            of_mean -= tl.sum(shift[:, None] * matrix, 0)
        tl.store(grad_mean + set_index * features + column, of_mean, mask=column < features)


@triton.jit
def _fold_channels(
    weight, bias, mean, whitener, folded, folded_bias, outputs, of_set, positions,
    OUTPUTS: tl.constexpr, POSITIONS: tl.constexpr,
):
    """Multiply some outputs of a weight of single channels by their whiteners, and take the means from the bias."""
    output, position = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, POSITIONS)
    there = output < outputs
    inside = there[:, None] & (position < positions)[None, :]
    mu = tl.load(mean + output // of_set, mask=there, other=0).to(tl.float32)
    number = tl.load(whitener + output // of_set, mask=there, other=0).to(tl.float32)
    at = output[:, None] * positions + position[None, :]
    product = tl.load(weight + at, mask=inside, other=0).to(tl.float32) * number[:, None]
    tl.store(folded + at, product, mask=inside)
    shift = tl.sum(product, 1) * mu
    if bias is not None:
        shift -= tl.load(bias + output, mask=there, other=0).to(tl.float32)
    tl.store(folded_bias + output, -shift, mask=there)


@triton.jit
def _fold_channels_backward(
    grad, grad_bias, weight, mean, whitener, own, grad_mean, grad_whitener, sets, outputs, positions,
    STATISTICS: tl.constexpr, SETS: tl.constexpr, ELEMENTS: tl.constexpr,
):
    """Compute all gradients of the outputs of some channels."""
    channel, slot = tl.program_id(0) * SETS + tl.arange(0, SETS), tl.arange(0, ELEMENTS)
    there = channel < sets
    mu = tl.load(mean + channel, mask=there, other=0).to(tl.float32)
    number = tl.load(whitener + channel, mask=there, other=0).to(tl.float32)
    product, shift = tl.zeros((SETS,), tl.float32), tl.zeros((SETS,), tl.float32)
    elements = outputs * positions
    for start in range(0, elements, ELEMENTS):
        element = start + slot
        inside = there[:, None] & (element < elements)[None, :]
        at = channel[:, None] * elements + element[None, :]
        of_bias = tl.load(grad_bias + at // positions, mask=inside, other=0).to(tl.float32)
        grads = tl.load(grad + at, mask=inside, other=0).to(tl.float32) - of_bias * mu[:, None]
        tl.store(own + at, grads * number[:, None], mask=inside)
        if STATISTICS:
            values = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
            product += tl.sum(values * grads, 1)
            shift += tl.sum(values * of_bias, 1)
    if STATISTICS:
        tl.store(grad_whitener + channel, product, mask=there)
        tl.store(grad_mean + channel, -shift * number, mask=there)
