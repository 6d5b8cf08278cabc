"""Kernels of the inverse root and of its gradient, against the plain form in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poisoned_memory
from timm_deconv.kernels import Root, roots
from timm_deconv.kernels.gpu import roots as kernels
from timm_deconv.kernels.gpu.launch import Unfit
from timm_deconv.linalg import covariance

PLAIN_ROOT, PLAIN_GRADIENT = roots.inverse_root.function, roots.inverse_root_backward.function

QUARTIC = Root(3, True, 1e-3, 0.0, True)
CASES = {
    "a matrix": (1, 32, 1000, 0.0, QUARTIC),
    "padding and shrinking": (2, 5, 10, 0.01, QUARTIC._replace(min_rows=4.0)),
    "quartic of two steps": (3, 24, 1000, 0.01, QUARTIC._replace(n_iter=2)),
    "64 features": (1, 64, 100, 0.01, QUARTIC._replace(min_rows=2.0)),
    "one step": (2, 9, 1000, 0.01, Root(1, False, 1e-3, 0.0, True)),
    "two steps": (2, 27, 20, 0.0, Root(2, False, 1e-3, 1.0, True)),
    "three steps": (1, 16, 1000, 0.01, Root(3, False, 1e-3, 0.0, False)),
    "six steps": (2, 27, 1000, 0.01, Root(6, False, 1e-3, 0.0, True)),
    "numbers": (130, 1, 1000, 0.01, QUARTIC),
    "numbers, one step": (3, 1, 1, 0.0, Root(1, False, 1e-3, 1.0, True)),
    "numbers, five steps": (3, 1, 20, 0.01, Root(5, False, 1e-3, 0.0, False)),
    "two tiles": (1, 96, 50, 0.01, QUARTIC._replace(min_rows=1.0)),
    "three tiles of two sets": (2, 147, 1000, 0.0, QUARTIC._replace(n_iter=2)),
    "two tiles, one step": (2, 65, 40, 0.01, Root(1, False, 1e-3, 1.0, True)),
}


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    with poisoned_memory():
        yield


def moments(sets: int, features: int) -> tuple[Tensor, Tensor]:
    rows = torch.randn(sets, 3 * features + 5, features) @ torch.randn(features, features) / features**0.5 + 0.5
    return covariance(rows)


def cotangents(sets: int, features: int) -> tuple[Tensor, Tensor]:
    return torch.randn(sets, features), torch.randn(sets, features, features)


def double(values: object) -> object:
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    return [double(value) for value in values]


def check(found: object, expected: object, tolerance: float = 1e-5) -> None:
    """Check tensors, and lists of them, against the largest number of each."""
    if not isinstance(found, Tensor):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check(one, other, tolerance)
        return
    assert (found.shape, found.is_contiguous()) == (expected.shape, True)
    if found.is_floating_point():
        finite = expected.isfinite()
        atol = tolerance * float(expected[finite].abs().max()) if finite.any() else 0.0
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("sets", "features", "row_count", "padding", "root"), CASES.values(), ids=CASES.keys())
def test_roots_and_gradients_are_those_of_the_plain_form(
    sets: int, features: int, row_count: int, padding: float, root: Root
) -> None:
    given, settings = moments(sets, features), (row_count, padding, root)
    found, expected = kernels.inverse_root(*given, *settings), PLAIN_ROOT(*double(given), *settings)
    check(found, expected)
    for mean, whitener, _, kept in (found, [*_single(expected)]):  # the ways there and back are of either form
        grads = cotangents(sets, features)
        ours = kernels.inverse_root_backward(*grads, mean, whitener, kept, *settings)
        of_double = [*double(grads), *double((expected[0], expected[1])), double(expected[3]), *settings]
        check(ours, PLAIN_GRADIENT(*of_double), 1e-4)


def _single(values: object) -> object:
    if isinstance(values, Tensor):
        return values.float() if values.is_floating_point() else values
    return [_single(value) for value in values]
