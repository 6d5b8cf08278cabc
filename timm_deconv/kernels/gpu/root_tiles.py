"""Kernels of the inverse root of more than 64 features: each program has one tile of a matrix, 64 x 64.

Launches follow one another where a tile needs all others: the norm, the products. `roots` launches them; there the
symbols are explained.
"""

import triton
import triton.language as tl

__all__ = [
    "cotangent_tiles",
    "finish_gradient",
    "gradient_tiles",
    "one_step_tiles",
    "regularise_tiles",
    "root_tiles",
    "square_tiles",
]

MOST_PARTS = tl.constexpr(64)
"""Most tiles of a matrix, each with its part of a sum."""

DEPTH = tl.constexpr(16)
"""Rows of a tile that are multiplied at a time; for more there are too few registers."""


@triton.jit
def regularise_tiles(
    mean, cov, whitened_mean, varies, wide, parts, features, padding, share, eps, least,
    TILES: tl.constexpr, TILE: tl.constexpr,
):
    """Write a tile of the regularised covariance, and its sum of squares."""
    i, j, matrix, base = _whereabouts(features, TILES)
    index = tl.arange(0, TILE)
    rows, columns = i * TILE + index, j * TILE + index
    in_rows, in_columns = rows < features, columns < features
    own = 1 - padding
    variance = tl.zeros([TILE], tl.float32)
    for k in range(TILES):
        place = k * TILE + index
        at = tl.load(mean + matrix * features + place, mask=place < features, other=0.0)
        diagonal = tl.load(cov + base + place * (features + 1), mask=place < features, other=0.0)
        variance += own * (diagonal + padding * at * at)
    of_all = tl.sum(variance) / features
    row_mean = tl.load(mean + matrix * features + rows, mask=in_rows, other=0.0)
    column_mean = tl.load(mean + matrix * features + columns, mask=in_columns, other=0.0)
    places, inside = _tile(base, rows, columns, features)
    tile = tl.load(cov + places, mask=inside, other=0.0)
    tile = own * (tile + padding * row_mean[:, None] * column_mean[None, :])
    on_diagonal = (rows[:, None] == columns[None, :]) & inside
    tile = (1 - share) * tile + tl.where(on_diagonal, share * of_all + eps, 0.0)
    tl.store(wide + places, tile, mask=inside)
    tl.store(parts + matrix * TILES * TILES + i * TILES + j, tl.sum(tile * tile))
    if j == 0:
        tl.store(whitened_mean + matrix * features + rows, own * row_mean, mask=in_rows)
        if i == 0:
            tl.store(varies + matrix, of_all > least)


@triton.jit
def square_tiles(
    wide, parts, varies, norm, first, square, features,
    ZEROES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):
    """Write the norm, and a tile of the normed matrix A and of A^2."""
    i, j, matrix, base = _whereabouts(features, TILES)
    index = tl.arange(0, TILE)
    rows, columns = i * TILE + index, j * TILE + index
    scale = tl.sqrt(_sum_of_parts(parts, matrix, TILES))
    reciprocal = 1 / scale
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(TILES * (TILE // DEPTH)):
        between = k * DEPTH + tl.arange(0, DEPTH)
        places, inside = _tile(base, rows, between, features)
        left = tl.load(wide + places, mask=inside, other=0.0) * reciprocal
        places, inside = _tile(base, between, columns, features)
        right = tl.load(wide + places, mask=inside, other=0.0) * reciprocal
        total = tl.dot(left, right, total, input_precision="tf32x3")
    places, inside = _tile(base, rows, columns, features)
    tl.store(square + places, total, mask=inside)
    tl.store(first + places, reciprocal * tl.load(wide + places, mask=inside, other=0.0), mask=inside)
    if i + j == 0:
        tl.store(norm + matrix, _norm_kept(scale, varies, matrix, ZEROES))


@triton.jit
def root_tiles(
    first, square, norm, upper, whitener, features,
    COEFFICIENTS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):
    """Write a tile of U = c2 I + c3 A + c4 A^2, and of the whitener (c0 I + c1 A + A^2 U) / sqrt(norm)."""
    i, j, matrix, base = _whereabouts(features, TILES)
    index = tl.arange(0, TILE)
    rows, columns = i * TILE + index, j * TILE + index
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(TILES * (TILE // DEPTH)):
        between = k * DEPTH + tl.arange(0, DEPTH)
        places, inside = _tile(base, rows, between, features)
        left = tl.load(square + places, mask=inside, other=0.0)
        total = tl.dot(
            left, _upper(first, square, base, between, columns, features, COEFFICIENTS), total, input_precision="tf32x3"
        )
    places, inside = _tile(base, rows, columns, features)
    tl.store(upper + places, _upper(first, square, base, rows, columns, features, COEFFICIENTS), mask=inside)
    total += COEFFICIENTS[1] * tl.load(first + places, mask=inside, other=0.0)
    total += tl.where(rows[:, None] == columns[None, :], COEFFICIENTS[0], 0.0)
    tl.store(whitener + places, total * tl.rsqrt(tl.load(norm + matrix)), mask=inside)


@triton.jit
def one_step_tiles(
    parts, varies, norm, first, whitener, features,
    ZEROES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):
    """Write the norm, and a tile of the normed matrix A, in place, and of the whitener (3 I - A) / (2 sqrt(norm))."""
    i, j, matrix, base = _whereabouts(features, TILES)
    index = tl.arange(0, TILE)
    rows, columns = i * TILE + index, j * TILE + index
    scale = tl.sqrt(_sum_of_parts(parts, matrix, TILES))
    kept = _norm_kept(scale, varies, matrix, ZEROES)
    places, inside = _tile(base, rows, columns, features)
    tile = tl.load(first + places, mask=inside, other=0.0) / scale
    root = tl.where(rows[:, None] == columns[None, :], 1.5, 0.0) - 0.5 * tile
    tl.store(first + places, tile, mask=inside)
    tl.store(whitener + places, root * tl.rsqrt(kept), mask=inside)
    if i + j == 0:
        tl.store(norm + matrix, kept)


@triton.jit
def cotangent_tiles(
    grad, norm, square, upper, product, of_square, features,
    C4: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):
    """Write a tile of P = G A^2 and of the cotangent G (U + c4 A^2) of A^2, before it is made symmetric."""
    i, j, matrix, base = _whereabouts(features, TILES)
    index = tl.arange(0, TILE)
    rows, columns = i * TILE + index, j * TILE + index
    total = tl.zeros([TILE, TILE], tl.float32)
    total_of_square = tl.zeros([TILE, TILE], tl.float32)
    for k in range(TILES * (TILE // DEPTH)):
        between = k * DEPTH + tl.arange(0, DEPTH)
        cotangent = _symmetric_tile(grad, base, rows, between, features)
        places, inside = _tile(base, between, columns, features)
        right = tl.load(square + places, mask=inside, other=0.0)
        total = tl.dot(cotangent, right, total, input_precision="tf32x3")
        right = tl.load(upper + places, mask=inside, other=0.0) + C4 * right
        total_of_square = tl.dot(cotangent, right, total_of_square, input_precision="tf32x3")
    places, inside = _tile(base, rows, columns, features)
    weight = tl.rsqrt(tl.load(norm + matrix))
    tl.store(product + places, weight * total, mask=inside)
    tl.store(of_square + places, weight * total_of_square, mask=inside)


@triton.jit
def gradient_tiles(
    grad, whitener, norm, first, of_square, of_first, parts, features,
    COEFFICIENTS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):
    """Write a tile of the cotangent of A, not symmetric yet, over that of P; and its part of the norm's cotangent.

    Without coefficients it is that of one step.
    """
    i, j, matrix, base = _whereabouts(features, TILES)
    index = tl.arange(0, TILE)
    rows, columns = i * TILE + index, j * TILE + index
    places, inside = _tile(base, rows, columns, features)
    cotangent = _symmetric_tile(grad, base, rows, columns, features)
    scaled = tl.rsqrt(tl.load(norm + matrix)) * cotangent
    if COEFFICIENTS is None:
        total = -0.5 * scaled
    else:
        total = tl.zeros([TILE, TILE], tl.float32)
        for k in range(TILES * (TILE // DEPTH)):
            between = k * DEPTH + tl.arange(0, DEPTH)
            left = _symmetric_tile(of_square, base, rows, between, features)
            right_places, right_inside = _tile(base, between, columns, features)
            right = tl.load(first + right_places, mask=right_inside, other=0.0)
            total = tl.dot(left, right, total, input_precision="tf32x3")
        product = tl.load(of_first + places, mask=inside, other=0.0)
        total = COEFFICIENTS[1] * scaled + COEFFICIENTS[3] * product + 2 * total
    tl.store(of_first + places, total, mask=inside)
    products = total * tl.load(first + places, mask=inside, other=0.0)
    products += 0.5 * cotangent * tl.load(whitener + places, mask=inside, other=0.0)
    tl.store(parts + matrix * TILES * TILES + i * TILES + j, tl.sum(products))


@triton.jit
def finish_gradient(
    grad_mean, mean, norm, first, of_first, parts, own_mean, grad_own_mean, grad_cov, features, padding, share,
    TILES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Write columns of the covariance's gradient, behind the norm, shrinking and padding, and the mean's there."""
    matrix = tl.program_id(1).to(tl.int64)
    base = matrix * features * features
    index = tl.arange(0, TILE)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weight = tl.rsqrt(tl.load(norm + matrix))
    reciprocal = weight * weight
    through_norm = _sum_of_parts(parts, matrix, TILES)
    diagonal = tl.zeros([TILE], tl.float32)
    for k in range(TILES):
        rows = k * TILE + index
        places = base + rows * (features + 1)
        diagonal += tl.load(of_first + places, mask=rows < features, other=0.0)
        diagonal -= through_norm * tl.load(first + places, mask=rows < features, other=0.0)
    variance = reciprocal * tl.sum(diagonal) / features
    through_padding = tl.zeros([COLUMNS], tl.float32)
    for k in range(TILES):
        rows = k * TILE + index
        places, inside = _tile(base, rows, columns, features)
        tile = _symmetric_tile(of_first, base, rows, columns, features)
        tile -= through_norm * tl.load(first + places, mask=inside, other=0.0)
        tile = (1 - share) * reciprocal * tile
        tile += tl.where(rows[:, None] == columns[None, :], share * variance, 0.0)
        at = tl.load(mean + matrix * features + rows, mask=rows < features, other=0.0)
        through_padding += tl.sum(at[:, None] * tile, 0)
        tl.store(grad_cov + places, (1 - padding) * tile, mask=inside)
    places, inside = matrix * features + columns, columns < features
    at = tl.load(mean + places, mask=inside, other=0.0)
    of_mean = tl.load(grad_mean + places, mask=inside, other=0.0)
    tl.store(own_mean + places, at / (1 - padding), mask=inside)
    tl.store(grad_own_mean + places, (1 - padding) * of_mean + 2 * padding * through_padding, mask=inside)


@triton.jit
def _whereabouts(features, TILES: tl.constexpr):
    """Return a program's row and column of tiles, its matrix, and where that begins."""
    tile, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    return tile // TILES, tile % TILES, matrix, matrix * features * features


@triton.jit
def _tile(base, rows, columns, features):
    """Return the places of a tile's numbers, and which of them there are."""
    inside = (rows[:, None] < features) & (columns[None, :] < features)
    return base + rows[:, None] * features + columns[None, :], inside


@triton.jit
def _symmetric_tile(matrices, base, rows, columns, features):
    """Load a tile of the symmetric part of a matrix."""
    places, inside = _tile(base, rows, columns, features)
    mirrored = base + columns[None, :] * features + rows[:, None]
    tile = tl.load(matrices + places, mask=inside, other=0.0)
    return 0.5 * (tile + tl.load(matrices + mirrored, mask=inside, other=0.0))


@triton.jit
def _upper(first, square, base, rows, columns, features, COEFFICIENTS):
    """Return a tile of U = c2 I + c3 A + c4 A^2."""
    places, inside = _tile(base, rows, columns, features)
    tile = COEFFICIENTS[3] * tl.load(first + places, mask=inside, other=0.0)
    tile += COEFFICIENTS[4] * tl.load(square + places, mask=inside, other=0.0)
    return tile + tl.where((rows[:, None] == columns[None, :]) & inside, COEFFICIENTS[2], 0.0)


@triton.jit
def _sum_of_parts(parts, matrix, TILES: tl.constexpr):
    """Sum what all tiles of a matrix have contributed."""
    index = tl.arange(0, MOST_PARTS)
    count = TILES * TILES
    return tl.sum(tl.load(parts + matrix * count + index, mask=index < count, other=0.0))


@triton.jit
def _norm_kept(scale, varies, matrix, ZEROES: tl.constexpr):
    """Return the norm, infinite where the whitener is to be zero."""
    if ZEROES:
        scale = tl.where(tl.load(varies + matrix) | (scale != scale), scale, float("inf"))
    return scale
