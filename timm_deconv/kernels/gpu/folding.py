"""Whitening folded into weight and bias in one launch, and the gradients of all that went in, in one or two.

An output has N rows of F features each: one for every block of a window, or for every block and kernel position of
blocks of pixels. Features are cut into T tiles. A weight of single channels, each with a whitener of its own, is
multiplied element by element.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from ..formats import is_channels_last, memory_format
from .launch import Unfit, check_dtypes, launch, padded, tiles

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
    rows, weight = _rows(weight, blocks), _dense(weight)
    folded = torch.empty_like(weight, dtype=dtype, memory_format=memory_format(channels_last))
    folded_bias = weight.new_empty(len(weight), dtype=dtype)
    given = [weight, None if bias is None else bias.contiguous(), mean.contiguous(), whitener.contiguous()]
    if _of_single_channels(blocks):
        positions = _power_of_two(rows.positions)
        outputs = max(ELEMENTS // positions, 1)
        sizes, constants = [len(weight), rows.outputs, rows.positions], {"OUTPUTS": outputs, "POSITIONS": positions}
        launch(_fold_channels, [_parts(len(weight), outputs)], *given, folded, folded_bias, *sizes, **constants)
    else:
        height = FEW_ROWS if tiles(rows.features) == 1 else ROWS
        outputs = max(height // rows.of_output, 1)
        grid, results = [_parts(rows.outputs, outputs), blocks.sets], [folded, folded_bias]
        formats = {"LAST": is_channels_last(weight), "FOLDED_LAST": channels_last}
        launch(_fold, grid, *given, *results, *rows, outputs, ROWS=height, **formats, **_tiling(blocks))
    return folded, folded_bias


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
    rows, grad_weight, weight = _rows(weight, blocks), _dense(grad_weight), _dense(weight)
    own = torch.empty_like(weight)
    of_statistics = [mean.new_empty(mean.shape), whitener.new_empty(whitener.shape)]
    given = [grad_weight, grad_bias.contiguous(), weight, mean.contiguous(), whitener.contiguous(), own]
    if _of_single_channels(blocks):
        elements = min(_power_of_two(rows.outputs * rows.positions), ELEMENTS)
        grid, sizes = [_parts(blocks.sets, ELEMENTS // elements)], [blocks.sets, rows.outputs, rows.positions]
        constants = {"STATISTICS": with_statistics, "SETS": ELEMENTS // elements, "ELEMENTS": elements}
        launch(_fold_channels_backward, grid, *given, *of_statistics, *sizes, **constants)
    else:
        _launch_backward(given, of_statistics, rows, blocks, with_statistics)
    return own, of_statistics if with_statistics else []


def _launch_backward(
    given: list[Tensor], of_statistics: list[Tensor], rows: _Rows, blocks: Blocks, with_statistics: bool
) -> None:
    """Launch the kernel for rows and, if several programs make parts of the statistics' gradients, their addition."""
    count, (splits, length) = tiles(rows.features), _splits(rows, blocks)
    alone, (grad_weight, _, weight, _, whitener, _) = splits == count == 1, given
    results, tiling = of_statistics, _tiling(blocks)
    if with_statistics and not alone:
        results = [value.new_empty(len(value), splits, *value.shape[1:]) for value in of_statistics]
    grid = [splits, (1 + with_statistics) * count**2, blocks.sets]
    formats = {"GRAD_LAST": is_channels_last(grad_weight), "LAST": is_channels_last(weight)}
    launch(_fold_backward, grid, *given, *results, *rows, length, ROWS=FEW_ROWS, ALONE=alone, **formats, **tiling)
    if results is not of_statistics:
        grid = [_parts(rows.features**2, CHUNK) + count, blocks.sets]
        constants = {"TILE": padded(rows.features), "TILES": count, "CHUNK": CHUNK, "PARTS": PARTS}
        launch(_add_parts, grid, *results, whitener, *of_statistics, splits, rows.features, **constants)


def _rows(weight: Tensor, blocks: Blocks) -> _Rows:
    """Describe the rows of a weight; `Unfit` where they are interleaved, as in published layers, or too long."""
    if blocks.interleaved or blocks.features > MOST_FEATURES or weight.numel() >= 2**31:
        raise Unfit
    outputs, channels, height, width = weight.shape
    positions = height * width
    of_output = channels * positions // blocks.features
    return _Rows(outputs // blocks.sets, of_output, positions, channels, blocks.features)


def _splits(rows: _Rows, blocks: Blocks) -> tuple[int, int]:
    """Return into how many parts the rows of a set are split, and how many tiles of rows each has."""
    number = _parts(rows.outputs * rows.of_output, FEW_ROWS)
    if number <= ALONE:
        return 1, number
    length = _parts(number, max(PROGRAMS // (tiles(rows.features) ** 2 * blocks.sets), 1))
    return _parts(number, length), length


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


def _parts(number: int, size: int) -> int:
    """Return in how many parts of a size a number comes; Triton's own function takes 4 us."""
    return -(-number // size)


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
