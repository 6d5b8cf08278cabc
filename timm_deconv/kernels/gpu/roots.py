"""The inverse root and its way back, with all that is around it in the same launches.

Sets of one feature are elementwise. Of up to 64 features, a program has the whole matrix and one launch does everything
(`root_matrices`). More are cut into tiles (`root_tiles`): three launches forward, three backward. To the kernels, A is
the regularised covariance over its norm, and U the upper part c2 I + c3 A + c4 A^2 of c0 I + c1 A + A^2 U, the quartic.
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
"""Of programs that multiply matrices; fewer would have too few registers."""


def inverse_root(
    mean: Tensor, cov: Tensor, row_count: int, padding: float, root: Root
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Estimate mean and whitener, in one launch for up to 64 features."""
    sets, features = mean.shape
    _check_fit(features, root, mean, cov)
    mean, cov = mean.contiguous(), cov.contiguous()
    whitened_mean, whitener = torch.empty_like(mean), torch.empty_like(cov)
    varies, norm = cov.new_empty(sets, dtype=torch.bool), cov.new_empty(sets, 1, 1)
    kept = [norm, *(torch.empty_like(cov) for _ in range(3 if root.coefficients else 1))]
    tensors = [mean, cov, whitened_mean, whitener, varies, *kept, *[None] * (4 - len(kept))]
    numbers = [padding, root.shrinkage(row_count, features), root.eps, LEAST_VARIANCE * root.eps]
    choices: dict[str, Any] = {"ZEROES": root.zeroes_constant and row_count > 1, "COEFFICIENTS": root.coefficients}
    if features == 1:
        args = [*tensors, root.n_iter, sets, *numbers]
        launch(root_matrices.whiten_numbers, [_parts(sets, NUMBERS)], *args, NUMBERS=NUMBERS, **choices)
    elif features <= TILE:
        args = [*tensors, _scratch(cov, 4), root.n_iter, features, *numbers]
        launch(root_matrices.whiten_matrix, [sets], *args, warps=WARPS, EXTENT=padded(features), **choices)
    else:
        _launch_tiles(tensors, numbers, **choices)
    return whitened_mean, whitener, varies, kept


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
    """Compute the gradients of mean and covariance, in one launch for up to 64 features."""
    sets, features = mean.shape
    _check_fit(features, root, grad_mean, grad_whitener, mean, whitener)
    tensors = [tensor.contiguous() for tensor in (grad_mean, grad_whitener, mean, whitener, *kept)]
    found = torch.empty_like(tensors[2]), torch.empty_like(tensors[2]), torch.empty_like(tensors[3])
    numbers = [padding, root.shrinkage(row_count, features)]
    if features == 1:
        args = [*tensors[:5], *found, sets, padding]
        launch(root_matrices.derive_numbers, [_parts(sets, NUMBERS)], *args, NUMBERS=NUMBERS)
    elif features <= TILE:
        steps = 1 if root.coefficients else root.n_iter
        args = [*tensors, *[None] * (8 - len(tensors)), *found, _scratch(whitener, 3 + 2 * steps), steps, features]
        choices: dict[str, Any] = {"COEFFICIENTS": root.coefficients, "EXTENT": padded(features)}
        launch(root_matrices.derive_matrix, [sets], *args, *numbers, warps=WARPS, **choices)
    else:
        _launch_tiles_backward(tensors, found, numbers, root.coefficients)
    return found


def _check_fit(features: int, root: Root, *tensors: Tensor) -> None:
    """Raise `Unfit` for what is not in float32, and for large matrices that are better left to a library's products."""
    check_dtypes(*tensors)
    tiled = features <= MOST_FEATURES and (root.coefficients is not None or root.n_iter == 1)
    single = all(tensor.dtype == torch.float32 for tensor in tensors) and root.n_iter <= FEW_STEPS
    if not single or not (features <= TILE or tiled):
        raise Unfit


def _parts(number: int, size: int) -> int:
    """Return in how many parts of a size a number comes."""
    return -(-number // size)


def _scratch(like: Tensor, matrices: int) -> Tensor:
    """Return memory for so many matrices of each set."""
    extent = padded(like.shape[-1])
    return like.new_empty(len(like), matrices, extent, extent)


def _launch_tiles(tensors: list[Any], numbers: list[float], ZEROES: bool, COEFFICIENTS: Any) -> None:
    mean, cov, whitened_mean, whitener, varies, norm, first, square, upper = tensors
    (sets, features), across = mean.shape, tiles(mean.shape[1])
    grid, constants = [across**2, sets], {"TILES": across, "TILE": TILE}
    parts, wide = cov.new_empty(sets, across**2), first if upper is None else upper  # until that is written itself
    args = [mean, cov, whitened_mean, varies, wide, parts, features, *numbers]
    launch(root_tiles.regularise_tiles, grid, *args, **constants)
    if COEFFICIENTS is None:
        args = [parts, varies, norm, first, whitener, features]
        launch(root_tiles.one_step_tiles, grid, *args, ZEROES=ZEROES, **constants)
        return
    args = [wide, parts, varies, norm, first, square, features]
    launch(root_tiles.square_tiles, grid, *args, warps=WARPS, ZEROES=ZEROES, **constants)
    args = [first, square, norm, upper, whitener, features]
    launch(root_tiles.root_tiles, grid, *args, warps=WARPS, COEFFICIENTS=COEFFICIENTS, **constants)


def _launch_tiles_backward(
    tensors: list[Tensor], found: tuple[Tensor, Tensor, Tensor], numbers: list[float], coefficients: Any
) -> None:
    grad_mean, grad, mean, whitener, norm, first, *powers = tensors
    (sets, features), across = mean.shape, tiles(mean.shape[1])
    grid, constants = [across**2, sets], {"TILES": across, "TILE": TILE}
    parts, of_first = mean.new_empty(sets, across**2), torch.empty_like(first)
    of_square = found[2]  # until that is written itself
    if powers:
        args = [grad, norm, *powers, of_first, of_square, features]
        launch(root_tiles.cotangent_tiles, grid, *args, warps=WARPS, C4=coefficients[4], **constants)
    args = [grad, whitener, norm, first, of_square, of_first, parts, features]
    launch(root_tiles.gradient_tiles, grid, *args, warps=WARPS, COEFFICIENTS=coefficients, **constants)
    args = [grad_mean, mean, norm, first, of_first, parts, *found, features, *numbers]
    launch(root_tiles.finish_gradient, [_parts(features, COLUMNS), sets], *args, COLUMNS=COLUMNS, **constants)
