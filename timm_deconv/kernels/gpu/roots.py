"""The inverse root and its way back, with all that is around it in the same launches.

Sets of one feature are elementwise. Of up to 64 features, a program has the whole matrix and one launch does everything
(`root_matrices`). More are cut into tiles (`root_tiles`): three launches forward, three backward. The kernels call A the
regularised covariance over its norm, and U the upper part c2 I + c3 A + c4 A^2 of the quartic c0 I + c1 A + A^2 U.
"""

from typing import Any

import torch
from torch import Tensor

from ..roots import FEW_STEPS, LEAST_VARIANCE, Root
from . import root_matrices, root_tiles
from .launch import TILE, Unfit, check_dtypes, launch, padded, tiles

__all__ = ["inverse_root", "inverse_root_backward"]

MOST_FEATURES = 512
"""Features of matrices that are cut into tiles; larger ones are left to a library's products."""

NUMBERS = 128
"""Sets of one feature that a program takes."""

COLUMNS = 32
"""Columns of a large gradient that a program finishes."""

WARPS = 8
"""Of programs that multiply 32 x 32 or more numbers; fewer would have too few registers."""


def inverse_root(
    mean: Tensor, cov: Tensor, row_count: int, padding: float, root: Root
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Estimate mean and whitener, in one launch for up to 64 features."""
    check_dtypes(mean, cov)
    sets, features = mean.shape
    _check_fit(features, root)
    mean, cov = mean.contiguous(), cov.contiguous()
    found = [torch.empty_like(mean), torch.empty_like(cov), cov.new_empty(sets, dtype=torch.bool)]
    kept = [cov.new_empty(sets, 1, 1), *(torch.empty_like(cov) for _ in range(3 if root.coefficients else 1))]
    regularisation = [padding, root.shrinkage(row_count, features), root.eps, LEAST_VARIANCE * root.eps]
    constants = {"ZEROES": root.zeroes_constant and row_count > 1, "COEFFICIENTS": root.coefficients}
    if features > TILE:
        _launch_tiles([mean, cov, *found, *kept], regularisation, **constants)
        return *found, kept
    args = [mean, cov, *found, *kept, *[None] * (4 - len(kept))]
    constants["STEPS"] = root.n_iter
    if features == 1:
        launch(
            root_matrices.whiten_numbers, [_parts(sets, NUMBERS)], *args, sets, *regularisation, NUMBERS=NUMBERS,
            **constants,
        )
    else:
        args += [_scratch(cov, 4), features, *regularisation]
        launch(
            root_matrices.whiten_matrix, [sets], *args, warps=_warps(features), EXTENT=padded(features), **constants
        )
    return *found, kept


def inverse_root_backward(
    grad_mean: Tensor, grad_whitener: Tensor, mean: Tensor, whitener: Tensor, kept: list[Tensor], row_count: int,
    padding: float, root: Root,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of mean and covariance, in one launch for up to 64 features."""
    check_dtypes(grad_mean, grad_whitener, mean, whitener)
    sets, features = mean.shape
    _check_fit(features, root)
    given = [tensor.contiguous() for tensor in (grad_mean, grad_whitener, mean, whitener, *kept)]
    found = torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(whitener)
    regularisation = [padding, root.shrinkage(row_count, features)]
    if features > TILE:
        _launch_tiles_backward([*given, *found], regularisation, root.coefficients)
    elif features == 1:
        args = [*given[:5], *found, sets, padding]
        launch(root_matrices.derive_numbers, [_parts(sets, NUMBERS)], *args, NUMBERS=NUMBERS)
    else:
        steps = 1 if root.coefficients else root.n_iter
        args = [*given, *[None] * (8 - len(given)), *found, _scratch(whitener, 3 + 2 * steps), features]
        constants = {"STEPS": steps, "COEFFICIENTS": root.coefficients, "EXTENT": padded(features)}
        launch(root_matrices.derive_matrix, [sets], *args, *regularisation, warps=_warps(features), **constants)
    return found


def _check_fit(features: int, root: Root) -> None:
    """Raise `Unfit` for roots in float64, and for large matrices that are better left to a library's products."""
    tiled = features <= MOST_FEATURES and (root.coefficients is not None or root.n_iter == 1)
    if root.n_iter > FEW_STEPS or not (features <= TILE or tiled):
        raise Unfit


def _warps(features: int) -> int:
    return WARPS if padded(features) >= 32 else 4


def _parts(number: int, size: int) -> int:
    """Return in how many parts of a size a number comes."""
    return -(-number // size)


def _scratch(like: Tensor, matrices: int) -> Tensor:
    """Return memory for so many matrices of each set."""
    extent = padded(like.shape[-1])
    return like.new_empty(len(like), matrices, extent, extent)


def _launch_tiles(tensors: list[Tensor], regularisation: list[float], ZEROES: bool, COEFFICIENTS: Any) -> None:
    mean, cov, whitened_mean, whitener, varies, norm, first, *powers = tensors
    sets, features = mean.shape
    across, constants = tiles(features), {"TILES": tiles(features), "TILE": TILE}
    grid, parts = [across**2, sets], cov.new_empty(sets, across**2)
    wide = powers[1] if powers else first  # until that is written itself
    args = [mean, cov, whitened_mean, varies, wide, parts, features, *regularisation]
    launch(root_tiles.regularise_tiles, grid, *args, **constants)
    if COEFFICIENTS is None:
        args = [parts, varies, norm, first, whitener, features]
        launch(root_tiles.one_step_tiles, grid, *args, ZEROES=ZEROES, **constants)
        return
    square, upper = powers
    args = [wide, parts, varies, norm, first, square, features]
    launch(root_tiles.square_tiles, grid, *args, warps=WARPS, ZEROES=ZEROES, **constants)
    args = [first, square, norm, upper, whitener, features]
    launch(root_tiles.root_tiles, grid, *args, warps=WARPS, COEFFICIENTS=COEFFICIENTS, **constants)


def _launch_tiles_backward(tensors: list[Tensor], regularisation: list[float], coefficients: Any) -> None:
    grad_mean, grad, mean, whitener, norm, first, *powers, own_mean, grad_own_mean, grad_cov = tensors
    sets, features = mean.shape
    across, constants = tiles(features), {"TILES": tiles(features), "TILE": TILE}
    grid, parts = [across**2, sets], mean.new_empty(sets, across**2)
    of_first, of_square = torch.empty_like(grad_cov), grad_cov  # until that is written itself
    if powers:
        args = [grad, norm, *powers, of_first, of_square, features]
        launch(root_tiles.cotangent_tiles, grid, *args, warps=WARPS, C4=coefficients[4], **constants)
    args = [grad, whitener, norm, first, of_square, of_first, parts, features]
    launch(root_tiles.gradient_tiles, grid, *args, warps=WARPS, COEFFICIENTS=coefficients, **constants)
    args = [grad_mean, mean, norm, first, of_first, parts, own_mean, grad_own_mean, grad_cov, features]
    grid = [_parts(features, COLUMNS), sets]
    launch(root_tiles.finish_gradient, grid, *args, *regularisation, COLUMNS=COLUMNS, **constants)
