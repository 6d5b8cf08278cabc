"""Kernels of the inverse root and of its way back, with all that is around it in the same launches.

Up to 64 features a program has a whole matrix, and one launch does everything; single features are elementwise. More
are cut into tiles (`root_tiles`): three launches forward, three backward. A is the covariance over its norm, U the
upper part c2 I + c3 A + c4 A^2 of the quartic c0 I + c1 A + A^2 U.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..roots import FEW_STEPS, LEAST_VARIANCE, Root
from . import root_tiles
from .launch import TILE, Unfit, check_dtypes, launch, padded, tiles

__all__ = ["inverse_root", "inverse_root_backward"]

MOST_FEATURES = 512
"""Features up to which the launches of tiles cost less than the products of a library."""

NUMBERS = 128
"""Sets of a single feature that a program has."""

COLUMNS = 32
"""Columns of a gradient that a program finishes."""


def inverse_root(
    mean: Tensor, cov: Tensor, row_count: int, padding: float, root: Root
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Launch the kernels of `timm_deconv.kernels.inverse_root`."""
    check_dtypes(mean, cov)
    sets, features = mean.shape
    _check_fit(features, root)
    mean, cov = mean.contiguous(), cov.contiguous()
    outputs = torch.empty_like(mean), torch.empty_like(cov), cov.new_empty(sets, dtype=torch.bool)
    kept = [cov.new_empty(sets, 1, 1), *(torch.empty_like(cov) for _ in range(3 if root.coefficients else 1))]
    regularisation = padding, root.shrinkage(row_count, features), root.eps, LEAST_VARIANCE * root.eps
    zeroes = root.zeroes_constant and row_count > 1
    if features > TILE:
        _launch_tiles(mean, cov, outputs, kept, regularisation, zeroes, root)
        return *outputs, kept
    extent = sets if features == 1 else features
    args = (mean, cov, *outputs, *kept, *[None] * (4 - len(kept)), extent, *regularisation)
    constants = {"ZEROES": zeroes, "STEPS": root.n_iter, "COEFFICIENTS": root.coefficients}
    if features == 1:
        launch(_whiten_numbers, (triton.cdiv(sets, NUMBERS),), *args, NUMBERS=NUMBERS, **constants)
    else:
        launch(_whiten_matrix, (sets,), *args, warps=_warps(features), EXTENT=padded(features), **constants)
    return *outputs, kept


def inverse_root_backward(
    grad_mean: Tensor,
    grad_whitener: Tensor,
    mean: Tensor,
    whitener: Tensor,
    kept: list[Tensor],
    row_count: int,
    padding: float,
    root: Root,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels of `timm_deconv.kernels.inverse_root_backward`."""
    check_dtypes(grad_mean, grad_whitener, mean, whitener)
    sets, features = mean.shape
    _check_fit(features, root)
    given = [tensor.contiguous() for tensor in (grad_mean, grad_whitener, mean, whitener, *kept)]
    outputs = torch.empty_like(given[2]), torch.empty_like(given[2]), torch.empty_like(given[3])
    regularisation = padding, root.shrinkage(row_count, features)
    if features > TILE:
        _launch_tiles_backward(given, outputs, regularisation, root.coefficients)
    elif features == 1:
        grid = (triton.cdiv(sets, NUMBERS),)
        launch(_whiten_numbers_backward, grid, *given[:5], *outputs, sets, padding, NUMBERS=NUMBERS)
    else:
        steps = 1 if root.coefficients else root.n_iter
        iterates = None if root.coefficients else whitener.new_empty(sets, max(steps - 2, 0), 2, features, features)
        launch(
            _whiten_matrix_backward,
            (sets,),
            *(*given, *[None] * (8 - len(given)), iterates, *outputs, features, *regularisation),
            warps=_warps(features),
            STEPS=steps,
            COEFFICIENTS=root.coefficients,
            EXTENT=padded(features),
        )
    return outputs


def _check_fit(features: int, root: Root) -> None:
    """Raise `Unfit` for roots in float64, and for large matrices whose steps are better left to a library's products."""
    tiled = features <= MOST_FEATURES and (root.coefficients is not None or root.n_iter == 1)
    if root.n_iter > FEW_STEPS or not (features <= TILE or tiled):
        raise Unfit("")


def _warps(features: int) -> int:
    """Return how many warps share the registers that matrices of so many features take."""
    return 8 if padded(features) == TILE else 4


def _launch_tiles(
    mean: Tensor,
    cov: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    kept: list[Tensor],
    regularisation: tuple[float, ...],
    zeroes: bool,
    root: Root,
) -> None:
    whitened_mean, whitener, varies = outputs
    norm, first, *powers = kept
    sets, features = mean.shape
    shape = {"TILES": tiles(features), "TILE": TILE}
    grid, parts = (shape["TILES"] ** 2, sets), cov.new_empty(sets, shape["TILES"] ** 2)
    wide = powers[1] if powers else first  # until it is written itself
    args = (mean, cov, whitened_mean, varies, wide, parts, features, *regularisation)
    launch(root_tiles.regularise_tiles, grid, *args, **shape)
    if not powers:
        launch(root_tiles.one_step_tiles, grid, parts, varies, norm, first, whitener, features, ZEROES=zeroes, **shape)
        return
    square, upper = powers
    args = (wide, parts, varies, norm, first, square, features)
    launch(root_tiles.square_tiles, grid, *args, warps=8, ZEROES=zeroes, **shape)
    args = (first, square, norm, upper, whitener, features)
    launch(root_tiles.root_tiles, grid, *args, warps=8, COEFFICIENTS=root.coefficients, **shape)


def _launch_tiles_backward(
    given: list[Tensor],
    outputs: tuple[Tensor, Tensor, Tensor],
    regularisation: tuple[float, float],
    coefficients: tuple[float, ...] | None,
) -> None:
    grad_mean, grad, mean, whitener, norm, first, *powers = given
    own_mean, grad_own_mean, grad_cov = outputs
    sets, features = mean.shape
    shape = {"TILES": tiles(features), "TILE": TILE}
    grid, parts = (shape["TILES"] ** 2, sets), mean.new_empty(sets, shape["TILES"] ** 2)
    of_square, of_first = grad_cov, torch.empty_like(grad_cov)  # the former until it is written itself
    if coefficients:
        args = (grad, norm, *powers, of_first, of_square, features)
        launch(root_tiles.cotangent_tiles, grid, *args, warps=8, C4=coefficients[4], **shape)
    args = (grad, whitener, norm, first, of_square, of_first, parts, features)
    launch(root_tiles.gradient_tiles, grid, *args, warps=8, COEFFICIENTS=coefficients, **shape)
    args = (grad_mean, mean, norm, first, of_first, parts, *outputs, features, *regularisation)
    grid = (triton.cdiv(features, COLUMNS), sets)
    launch(root_tiles.finish_gradient, grid, *args, COLUMNS=COLUMNS, **shape)


@triton.jit
def _whiten_numbers(
    mean, cov, whitened_mean, whitener, varies, norm, first, square, upper, sets, padding, share, eps, least,
    ZEROES: tl.constexpr, STEPS: tl.constexpr, COEFFICIENTS: tl.constexpr, NUMBERS: tl.constexpr,
):
    """Whiten single features; shrinking changes nothing."""
    index = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    inside = index < sets
    at = tl.load(mean + index, mask=inside, other=0.0)
    number = tl.load(cov + index, mask=inside, other=1.0)
    number = (1 - padding) * (number + padding * at * at)
    a, kept = _normed(number + eps, tl.abs(number + eps), number, least, ZEROES)
    if COEFFICIENTS is None:
        z = 1.5 - 0.5 * a
        y = a * z
        for _ in range(STEPS - 1):
            t = 1.5 - 0.5 * z * y
            y, z = y * t, t * z
    else:
        of_square = a * a
        of_upper = COEFFICIENTS[2] + COEFFICIENTS[3] * a + COEFFICIENTS[4] * of_square
        z = COEFFICIENTS[0] + COEFFICIENTS[1] * a + of_square * of_upper
        tl.store(square + index, of_square, mask=inside)
        tl.store(upper + index, of_upper, mask=inside)
    tl.store(whitened_mean + index, (1 - padding) * at, mask=inside)
    tl.store(whitener + index, z * tl.rsqrt(kept), mask=inside)
    tl.store(varies + index, number > least, mask=inside)
    tl.store(norm + index, kept, mask=inside)
    tl.store(first + index, a, mask=inside)


@triton.jit
def _whiten_numbers_backward(
    grad_mean, grad, mean, whitener, norm, own_mean, grad_own_mean, grad_cov, sets, padding,
    NUMBERS: tl.constexpr,
):
    """Derive the inverse root of a number, of which only the norm's part is left: A is 1."""
    index = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    inside = index < sets
    at = tl.load(mean + index, mask=inside, other=0.0)
    of_mean = tl.load(grad_mean + index, mask=inside, other=0.0)
    of_root = tl.load(grad + index, mask=inside, other=0.0)
    root = tl.load(whitener + index, mask=inside, other=0.0)
    of_cov = -0.5 * of_root * root / tl.load(norm + index, mask=inside, other=1.0)
    tl.store(own_mean + index, at / (1 - padding), mask=inside)
    tl.store(grad_own_mean + index, (1 - padding) * of_mean + 2 * padding * at * of_cov, mask=inside)
    tl.store(grad_cov + index, (1 - padding) * of_cov, mask=inside)


@triton.jit
def _whiten_matrix(
    mean, cov, whitened_mean, whitener, varies, norm, first, square, upper, features, padding, share, eps, least,
    ZEROES: tl.constexpr, STEPS: tl.constexpr, COEFFICIENTS: tl.constexpr, EXTENT: tl.constexpr,
):
    """Whiten a set of features: padding, shrinking, eps, norm, and the quartic or the steps."""
    matrix = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, EXTENT)
    places, inside, eye = _square_of(matrix, index, features)
    vectors = matrix * features + index
    at = tl.load(mean + vectors, mask=index < features, other=0.0)
    a = tl.load(cov + places, mask=inside, other=0.0)
    a = (1 - padding) * (a + padding * at[:, None] * at[None, :])
    variance = tl.sum(a * eye) / features
    a = (1 - share) * a + (share * variance + eps) * tl.where(inside, eye, 0.0)
    a, kept = _normed(a, tl.sqrt(tl.sum(a * a)), variance, least, ZEROES)
    tl.store(first + places, a, mask=inside)
    if COEFFICIENTS is None:
        root = 1.5 * eye - 0.5 * a
        if STEPS > 1:
            y = _times(a, root)
            for _ in range(STEPS - 2):
                t = 1.5 * eye - 0.5 * _times(root, y)
                y = _times(y, t)
                root = _times(t, root)
            root = _times(1.5 * eye - 0.5 * _times(root, y), root)
    else:
        of_square = _times(a, a)
        tl.store(square + places, of_square, mask=inside)
        of_upper = COEFFICIENTS[2] * eye + COEFFICIENTS[3] * a + COEFFICIENTS[4] * of_square
        tl.store(upper + places, of_upper, mask=inside)
        root = COEFFICIENTS[0] * eye + COEFFICIENTS[1] * a + _times(of_square, of_upper)
    tl.store(whitener + places, root * tl.rsqrt(kept), mask=inside)
    tl.store(whitened_mean + vectors, (1 - padding) * at, mask=index < features)
    tl.store(varies + matrix, variance > least)
    tl.store(norm + matrix, kept)


@triton.jit
def _whiten_matrix_backward(
    grad_mean, grad, mean, whitener, norm, first, square, upper, iterates, own_mean, grad_own_mean, grad_cov,
    features, padding, share,
    STEPS: tl.constexpr, COEFFICIENTS: tl.constexpr, EXTENT: tl.constexpr,
):
    """Derive all that `_whiten_matrix` does of a set of features."""
    matrix = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, EXTENT)
    places, inside, eye = _square_of(matrix, index, features)
    a = tl.load(first + places, mask=inside, other=0.0)
    weight = tl.rsqrt(tl.load(norm + matrix))
    g = _symmetric(tl.load(grad + places, mask=inside, other=0.0))
    through_norm = 0.5 * tl.sum(g * tl.load(whitener + places, mask=inside, other=0.0))
    g *= weight
    if COEFFICIENTS is None:
        g = _steps_backward(g, a, iterates + matrix * max(2 * (STEPS - 2), 0) * features * features, features, STEPS, EXTENT)
    else:
        of_square = tl.load(square + places, mask=inside, other=0.0)
        of_upper = tl.load(upper + places, mask=inside, other=0.0)
        of_square_too = _symmetric(_times(g, of_upper + COEFFICIENTS[4] * of_square))
        g = COEFFICIENTS[1] * g + COEFFICIENTS[3] * _times(g, of_square) + 2 * _times(of_square_too, a)
        g = _symmetric(g)
    through_norm += tl.sum(g * a)
    g = (weight * weight) * (g - through_norm * a)
    g = (1 - share) * g + share * (tl.sum(g * eye) / features) * eye
    vectors = matrix * features + index
    at = tl.load(mean + vectors, mask=index < features, other=0.0)
    of_mean = tl.load(grad_mean + vectors, mask=index < features, other=0.0)
    of_mean = (1 - padding) * of_mean + 2 * padding * tl.sum(at[:, None] * g, 0)
    tl.store(own_mean + vectors, at / (1 - padding), mask=index < features)
    tl.store(grad_own_mean + vectors, of_mean, mask=index < features)
    tl.store(grad_cov + places, (1 - padding) * g, mask=inside)


@triton.jit
def _steps_backward(g, a, iterates, features, STEPS: tl.constexpr, EXTENT: tl.constexpr):
    """Return the cotangent of A from that of the last Z, as `_symmetric_backward` of the plain form does.

    Y and Z of every step are computed again and wait in memory.
    """
    if STEPS == 1:
        g = -0.5 * g
    else:
        places, inside, eye = _square_of(0, tl.arange(0, EXTENT), features)
        size = features * features
        z = 1.5 * eye - 0.5 * a
        y = _times(a, z)
        for step in range(STEPS - 2):
            tl.store(iterates + 2 * step * size + places, y, mask=inside)
            tl.store(iterates + (2 * step + 1) * size + places, z, mask=inside)
            t = 1.5 * eye - 0.5 * _times(z, y)
            y = _times(y, t)
            z = _times(t, z)
        p = _times(g, z)
        grad_y = -0.5 * _symmetric(_times(z, p))
        grad_z = _symmetric(1.5 * g - _times(p, y))
        tl.debug_barrier()  # other threads of the program read what was written
        for step in range(STEPS - 2):
            back = STEPS - 3 - step
            y = tl.load(iterates + 2 * back * size + places, mask=inside, other=0.0)
            z = tl.load(iterates + (2 * back + 1) * size + places, mask=inside, other=0.0)
            p = _times(grad_z, z)
            q = _times(y, grad_y)
            grad_y = _symmetric(1.5 * grad_y - 0.5 * _times(z, p + 2 * q))
            grad_z = _symmetric(1.5 * grad_z - 0.5 * _times(2 * p + q, y))
        g = _symmetric(1.5 * grad_y - _times(grad_y, a)) - 0.5 * grad_z
    return g


@triton.jit
def _square_of(matrix, index, features):
    """Return the places of a matrix, which of them there are, and the identity, that of what is not there too."""
    row, column = index[:, None], index[None, :]
    inside = (row < features) & (column < features)
    return (matrix * features + row) * features + column, inside, tl.where(row == column, 1.0, 0.0)


@triton.jit
def _normed(matrix, scale, variance, least, ZEROES: tl.constexpr):
    """Return a matrix over its norm, and the norm as it is kept: infinite where the whitener is to be zero."""
    kept = scale
    if ZEROES:
        kept = tl.where(variance <= least, float("inf"), scale)
    return matrix / scale, kept


@triton.jit
def _times(left, right):
    return tl.dot(left, right, input_precision="tf32x3")


@triton.jit
def _symmetric(matrix):
    return 0.5 * (matrix + tl.trans(matrix))
