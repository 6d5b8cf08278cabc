"""The inverse root and its way back, with all that is around it in the same launches.

Sets of one feature are elementwise. Of up to 64 features, a program has the whole matrix and one launch does everything
(`root_matrices`). More are cut into tiles (`root_tiles`): three launches forward, three backward. To the kernels, A is
the regularised covariance over its norm, and U the upper part c2 I + c3 A + c4 A^2 of c0 I + c1 A + A^2 U, the quartic.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..roots import FEW_STEPS, LEAST_VARIANCE, Root
from . import root_matrices, root_tiles
from .launch import PLANS, TILE, Launch, Unfit, check_dtypes, padded, parts_of, tiles

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
    _check_dtypes(mean, cov)
    plan = _plan(mean.shape, row_count, padding, root)
    mean, cov = mean.contiguous(), cov.contiguous()
    whitened_mean, whitener = torch.empty_like(mean), torch.empty_like(cov)
    varies, norm = cov.new_empty(len(cov), dtype=torch.bool), cov.new_empty(len(cov), 1, 1)
    first, square, upper = (torch.empty_like(cov) if power else None for power in plan.powers)
    scratch = cov.new_empty(plan.scratch)
    if len(plan.launches) == 1:
        plan.launches[0](mean, cov, whitened_mean, whitener, varies, norm, first, square, upper, scratch)
    else:
        regularise, *powers, finish = plan.launches
        wide = first if upper is None else upper  # until that is written itself
        regularise(mean, cov, whitened_mean, varies, wide, scratch)
        for launch in powers:
            launch(wide, scratch, varies, norm, first, square)
        finish(*((first, square, norm, upper, whitener) if powers else (scratch, varies, norm, first, whitener)))
    return whitened_mean, whitener, varies, [norm, *(power for power in (first, square, upper) if power is not None)]


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
    _check_dtypes(grad_mean, grad_whitener, mean, whitener)
    plan = _plan_backward(mean.shape, row_count, padding, root)
    given = [tensor.contiguous() for tensor in (grad_mean, grad_whitener, mean, whitener, *kept)]
    found = torch.empty_like(given[2]), torch.empty_like(given[2]), torch.empty_like(given[3])
    scratch = whitener.new_empty(plan.scratch)
    if len(plan.launches) == 1:
        plan.launches[0](*given, *[None] * (8 - len(given)), *found, scratch)
        return found
    grad_mean, grad, mean, whitener, norm, first, *powers = given
    *cotangents, derive, finish = plan.launches
    of_first, of_square = torch.empty_like(first), found[2]  # until that is written itself
    for launch in cotangents:
        launch(grad, norm, *powers, of_first, of_square)
    derive(grad, whitener, norm, first, of_square, of_first, scratch)
    finish(grad_mean, mean, norm, first, of_first, scratch, *found)
    return found


def _check_dtypes(*tensors: Tensor) -> None:
    """Raise `Unfit` for what is not in float32; silently, but for float64."""
    check_dtypes(*tensors)
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise Unfit


class _Plan(NamedTuple):
    """How roots, or their gradients, of matrices of a shape are computed.

    Attributes:
        launches: one, or those of matrices that are cut into tiles.
        scratch: the shape of memory that they share.
        powers: which are kept of A, its square and U.
    """

    launches: tuple[Launch, ...]
    scratch: tuple[int, ...]
    powers: tuple[bool, bool, bool] = (False, False, False)


@functools.lru_cache(PLANS)
def _plan(shape: torch.Size, row_count: int, padding: float, root: Root) -> _Plan:
    """Plan the whiteners of means and covariances of sets, `shape` (S, F)."""
    sets, features = shape
    _check_fit(features, root)
    numbers = [padding, root.shrinkage(row_count, features), root.eps, LEAST_VARIANCE * root.eps]
    zeroes, coefficients = root.zeroes_constant and row_count > 1, root.coefficients
    choices: dict[str, Any] = {"ZEROES": zeroes, "COEFFICIENTS": coefficients}
    powers = (True, coefficients is not None, coefficients is not None)
    if features == 1:
        grid, choices = [parts_of(sets, NUMBERS)], choices | {"NUMBERS": NUMBERS}
        launch = Launch(root_matrices.whiten_numbers, grid, root.n_iter, sets, *numbers, **choices)
        return _Plan((launch,), (0,), powers)
    if features <= TILE:
        choices["EXTENT"] = padded(features)
        launch = Launch(root_matrices.whiten_matrix, [sets], root.n_iter, features, *numbers, warps=WARPS, **choices)
        return _Plan((launch,), _scratch(shape, 4), powers)
    across = tiles(features)
    grid, constants = [across**2, sets], {"TILES": across, "TILE": TILE}
    regularise = Launch(root_tiles.regularise_tiles, grid, features, *numbers, **constants)
    if coefficients is None:
        step = Launch(root_tiles.one_step_tiles, grid, features, ZEROES=zeroes, **constants)
        return _Plan((regularise, step), (sets, across**2), powers)
    square = Launch(root_tiles.square_tiles, grid, features, warps=WARPS, ZEROES=zeroes, **constants)
    finish = Launch(root_tiles.root_tiles, grid, features, warps=WARPS, COEFFICIENTS=coefficients, **constants)
    return _Plan((regularise, square, finish), (sets, across**2), powers)


@functools.lru_cache(PLANS)
def _plan_backward(shape: torch.Size, row_count: int, padding: float, root: Root) -> _Plan:
    """Plan the gradients of means and covariances of sets, `shape` (S, F)."""
    sets, features = shape
    _check_fit(features, root)
    numbers, coefficients = [padding, root.shrinkage(row_count, features)], root.coefficients
    if features == 1:
        grid = [parts_of(sets, NUMBERS)]
        return _Plan((Launch(root_matrices.derive_numbers, grid, sets, padding, NUMBERS=NUMBERS),), (0,))
    if features <= TILE:
        steps = 1 if coefficients else root.n_iter
        choices: dict[str, Any] = {"COEFFICIENTS": coefficients, "EXTENT": padded(features)}
        launch = Launch(root_matrices.derive_matrix, [sets], steps, features, *numbers, warps=WARPS, **choices)
        return _Plan((launch,), _scratch(shape, 3 + 2 * steps))
    across = tiles(features)
    grid, constants = [across**2, sets], {"TILES": across, "TILE": TILE}
    derive = Launch(root_tiles.gradient_tiles, grid, features, warps=WARPS, COEFFICIENTS=coefficients, **constants)
    columns = [parts_of(features, COLUMNS), sets]
    launches = [derive, Launch(root_tiles.finish_gradient, columns, features, *numbers, COLUMNS=COLUMNS, **constants)]
    if coefficients is not None:
        kernel, c4 = root_tiles.cotangent_tiles, coefficients[4]
        launches.insert(0, Launch(kernel, grid, features, warps=WARPS, C4=c4, **constants))
    return _Plan(tuple(launches), (sets, across**2))


def _check_fit(features: int, root: Root) -> None:
    """Raise `Unfit` for large matrices that are better left to a library's products, and for steps in float64."""
    tiled = features <= MOST_FEATURES and (root.coefficients is not None or root.n_iter == 1)
    if root.n_iter > FEW_STEPS or not (features <= TILE or tiled):
        raise Unfit


def _scratch(shape: torch.Size, matrices: int) -> tuple[int, ...]:
    """Return the shape of memory for so many matrices of each set."""
    extent = padded(shape[1])
    return shape[0], matrices, extent, extent
