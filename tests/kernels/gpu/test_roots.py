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
ONE_STEP = Root(1, False, 1e-3, 1.0, True)
CASES = {
    "a matrix": (1, 32, 1000, 0.0, QUARTIC),
    "padding and shrinking": (2, 5, 10, 0.01, QUARTIC._replace(min_rows=4.0)),
    "quartic of two steps": (3, 24, 1000, 0.01, QUARTIC._replace(n_iter=2)),
    "64 features": (1, 64, 100, 0.01, QUARTIC._replace(min_rows=2.0)),
    "one step": (2, 9, 1000, 0.01, ONE_STEP),
    "two steps": (2, 27, 20, 0.0, Root(2, False, 1e-3, 1.0, True)),
    "three steps": (1, 16, 1000, 0.01, Root(3, False, 1e-3, 0.0, False)),
    "six steps": (2, 27, 1000, 0.01, Root(6, False, 1e-3, 0.0, True)),
    "numbers": (130, 1, 1000, 0.01, QUARTIC),
    "numbers, one step": (3, 1, 1, 0.0, ONE_STEP),
    "numbers, five steps": (3, 1, 20, 0.01, Root(5, False, 1e-3, 0.0, False)),
    "two tiles": (1, 96, 50, 0.01, QUARTIC._replace(min_rows=1.0)),
    "three tiles": (1, 147, 1000, 0.0, QUARTIC._replace(n_iter=2)),
    "two tiles, one step": (2, 65, 40, 0.01, ONE_STEP),
}


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    with poisoned_memory():
        yield


def moments(sets: int, features: int) -> tuple[Tensor, Tensor]:
    rows = torch.randn(sets, 3 * features + 5, features) @ torch.randn(features, features) / features**0.5 + 0.5
    return covariance(rows)


def single(values: object) -> object:
    if isinstance(values, Tensor):
        return values.float() if values.is_floating_point() else values
    return [single(value) for value in values]


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
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=atol)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("sets", "features", "row_count", "padding", "root"), CASES.values(), ids=CASES.keys())
def test_roots_and_gradients_are_those_of_the_plain_form(
    sets: int, features: int, row_count: int, padding: float, root: Root
) -> None:
    given, settings = moments(sets, features), (row_count, padding, root)
    found, expected = kernels.inverse_root(*given, *settings), PLAIN_ROOT(*double(given), *settings)
    check(found, expected)
    for mean, whitener, _, kept in (found, [*single(expected)]):  # the ways there and back are of either form
        grads = cotangents(sets, features)
        ours = kernels.inverse_root_backward(*grads, mean, whitener, kept, *settings)
        of_double = [*double(grads), *double((expected[0], expected[1])), double(expected[3]), *settings]
        check(ours, PLAIN_GRADIENT(*of_double), 1e-4)


@pytest.mark.parametrize(("features", "root"), [(24, QUARTIC), (24, Root(5, False, 1e-3, 0.0, True)), (70, QUARTIC)])
def test_roots_and_gradients_of_condition_1e5_are_those_of_float64(features: int, root: Root) -> None:
    vectors = torch.linalg.qr(torch.randn(features, features))[0]
    cov = (vectors * torch.logspace(2, -3, features)) @ vectors.T
    given = torch.randn(1, features), ((cov + cov.T) / 2)[None]
    settings = (1000, 0.0, root._replace(eps=1e-9))
    found, expected = kernels.inverse_root(*given, *settings), PLAIN_ROOT(*double(given), *settings)
    check(found, expected)
    grads = cotangents(1, features)
    ours = kernels.inverse_root_backward(*grads, found[0], found[1], found[3], *settings)
    check(ours, PLAIN_GRADIENT(*double(grads), expected[0], expected[1], expected[3], *settings), 1e-4)


@pytest.mark.parametrize(
    ("features", "root"), [(5, QUARTIC), (20, Root(4, False, 1e-3, 1.0, True)), (1, QUARTIC), (70, ONE_STEP)]
)
def test_a_set_that_does_not_vary_and_one_that_is_not_finite_do_not_touch_the_others(features: int, root: Root) -> None:
    mean, cov = moments(3, features)
    cov[0], mean[0] = 0, 0
    cov[1, -1, 0] = torch.nan
    whitened_mean, whitener, varies, kept = kernels.inverse_root(mean, cov, 100, 0.01, root)
    assert varies.tolist() == [False, features > 1, True]
    assert not whitener[0].any() and whitener[1].isnan().all()
    grads = cotangents(3, features)
    settings = (100, 0.01, root)
    _, of_mean, of_cov = kernels.inverse_root_backward(*grads, whitened_mean, whitener, kept, *settings)
    assert not of_cov[0].any() and of_cov[1].isnan().all()
    torch.testing.assert_close(of_mean[0], 0.99 * grads[0][0])
    alone = kernels.inverse_root(mean[2:], cov[2:], *settings)
    check([whitened_mean[2:], whitener[2:], varies[2:], [value[2:] for value in kept]], alone)
    grads = [value[2:] for value in grads]
    check([of_mean[2:], of_cov[2:]], kernels.inverse_root_backward(*grads, *alone[:2], alone[3], *settings)[1:])


@pytest.mark.parametrize(("features", "root"), [(1, QUARTIC), (12, QUARTIC), (66, ONE_STEP)])
def test_strides_of_arguments_do_not_matter(features: int, root: Root) -> None:
    mean, cov = moments(2, features)
    grad_mean, grad = cotangents(2, features)
    settings = (10, 0.01, root)
    expected = kernels.inverse_root(mean, cov, *settings)
    found = kernels.inverse_root(spaced(mean), spaced(cov), *settings)
    check(found, expected)
    kept = [spaced(value) for value in found[3]]
    found = kernels.inverse_root_backward(spaced(grad_mean), grad.mT, spaced(found[0]), found[1].mT, kept, *settings)
    check(found, kernels.inverse_root_backward(grad_mean, grad, *expected[:2], expected[3], *settings))


def spaced(values: Tensor) -> Tensor:
    return torch.stack([values, values], -1)[..., 1]


@pytest.mark.parametrize(
    ("features", "root", "dtype", "reason"),
    [
        (8, Root(7, False, 1e-3, 0.0, True), torch.float32, ""),
        (65, Root(3, False, 1e-3, 0.0, True), torch.float32, ""),
        (513, QUARTIC, torch.float32, ""),
        (8, QUARTIC, torch.float64, "the tensors are float64"),
        (8, QUARTIC, torch.bfloat16, ""),
    ],
    ids=["many steps", "large matrices in steps", "very large matrices", "float64", "bfloat16"],
)
def test_other_roots_are_left_to_the_plain_form(features: int, root: Root, dtype: torch.dtype, reason: str) -> None:
    mean, cov = torch.zeros(1, features, dtype=dtype), torch.zeros(1, features, features, dtype=dtype)
    with pytest.raises(Unfit, match=reason or "^$") as found:
        kernels.inverse_root(mean, cov, 10, 0.0, root)
    assert bool(str(found.value)) == bool(reason)
    with pytest.raises(Unfit, match=reason or "^$"):
        kernels.inverse_root_backward(mean, cov, mean, cov, [cov[:, :1, :1], cov, cov, cov], 10, 0.0, root)
