"""The root and its hand-written gradient are the plain formula's; they cost what is stated and bear low precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.golden_files import golden_folder, relative_error
from timm_deconv.kernels.onednn import FEW_PRODUCTS
from timm_deconv.kernels.roots import Root, inverse_root, inverse_root_backward, plain_root
from timm_deconv.linalg import QUARTICS, covariance, isqrt_newton_schulz, isqrt_quartic

CASES = load_file(golden_folder() / "isqrt" / "cases.safetensors")
COMPUTE_ROOT, COMPUTE_GRADIENT = inverse_root.function, inverse_root_backward.function  # counters see into these


def root_alone(cov: Tensor, n_iter: int, quartic: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the inverse root of covariances as they are."""
    _, root, _, kept = COMPUTE_ROOT(cov[:, 0], cov, 1, 0.0, Root(n_iter, quartic, 0.0, 0.0, False))
    return root, kept


def gradient_alone(grad: Tensor, root: Tensor, kept: list[Tensor], n_iter: int, quartic: bool) -> Tensor:
    """Compute the gradient with respect to the covariances of `root_alone`."""
    zeros, choices = torch.zeros_like(grad[:, 0]), Root(n_iter, quartic, 0.0, 0.0, False)
    return COMPUTE_GRADIENT(zeros, grad, zeros, root, kept, 1, 0.0, choices)[2]


@pytest.mark.parametrize(("n_iter", "backward"), [(1, 0), (3, 12), (5, 26)])
def test_steps_cost_the_products_that_are_stated(n_iter: int, backward: int) -> None:
    cov = torch.eye(10).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        root, kept = root_alone(cov, n_iter, False)
    assert counter.get_total_flops() == 3 * (n_iter - 1) * 2 * 10**3
    with FlopCounterMode(display=False) as counter:
        gradient_alone(root, root, kept, n_iter, False)
    assert counter.get_total_flops() == backward * 2 * 10**3


@pytest.mark.parametrize("n_iter", QUARTICS)
def test_the_quartic_costs_five_products(n_iter: int) -> None:
    cov = torch.eye(10).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        root, kept = root_alone(cov, n_iter, True)
        gradient_alone(root, root, kept, n_iter, True)
    assert counter.get_total_flops() == 5 * 2 * 10**3


@pytest.mark.parametrize("n_iter", [1, 2, 5, 6, 7, 15])
@pytest.mark.parametrize("matrix", ["random24", "photo27", "condition1e6_32"])
@pytest.mark.parametrize("exact", [isqrt_newton_schulz, isqrt_quartic])
def test_the_root_is_differentiated_by_hand_as_by_the_chain_rule(matrix: str, n_iter: int, exact: Callable) -> None:
    cov = CASES[f"{matrix}.covariance"].unsqueeze(0).requires_grad_()
    cotangent = CASES[f"{matrix}.cotangent"].unsqueeze(0)
    (expected,) = torch.autograd.grad(exact(cov, n_iter), cov, cotangent)
    quartic = exact is isqrt_quartic
    root, kept = root_alone(cov.detach(), n_iter, quartic)
    assert relative_error(root, exact(cov.detach(), n_iter)) < 1e-9
    grad = gradient_alone(cotangent, root, kept, n_iter, quartic)
    assert relative_error(grad, (expected + expected.mT) / 2) < 1e-7


@pytest.mark.parametrize(("n_iter", "quartic"), [(1, False), (3, True), (5, False)])
def test_roots_of_many_features_and_their_gradients_are_those_of_float64(n_iter: int, quartic: bool) -> None:
    features = 208
    assert features**3 > FEW_PRODUCTS  # convolutions in float32, matrix products in float64
    cov = covariance(torch.randn(1, 1000, features) @ torch.randn(features, features))[1]
    grad = torch.randn_like(cov)
    found = []
    for dtype in (torch.float32, torch.float64):
        root, kept = root_alone(cov.to(dtype), n_iter, quartic)
        found.append((root, gradient_alone(grad.to(dtype), root, kept, n_iter, quartic)))
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 1e-5


class LowPrecision(TorchFunctionMode):
    """Rounds the factors of float32 products to so many bits, as tensor cores do with TF32 (10 bits)."""

    PRODUCTS = (torch.bmm, torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__)

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.dropped = 23 - bits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return func(*args, **(kwargs or {}))

    def rounded(self, factor: torch.Tensor) -> torch.Tensor:
        if factor.dtype != torch.float32:
            return factor
        bits = factor.contiguous().view(torch.int32)
        half = 1 << (self.dropped - 1)
        return ((bits + half) >> self.dropped << self.dropped).view(torch.float32)


@pytest.mark.parametrize(("n_iter", "quartic"), [(3, False), (3, True), (5, False), (6, False), (15, False)])
def test_roots_and_gradients_bear_products_of_ten_bits(n_iter: int, quartic: bool) -> None:
    rows = torch.randn(4096, 27) @ torch.diag(torch.logspace(0, -3, 27)) @ torch.linalg.qr(torch.randn(27, 27))[0]
    cov = covariance(rows[None])[1] + 1e-6 * torch.eye(27)  # of condition 10^6
    grad = torch.randn(1, 27, 27)
    root, kept = root_alone(cov, n_iter, quartic)
    expected = (root, gradient_alone(grad, root, kept, n_iter, quartic))
    with LowPrecision(10):
        rounded, kept = root_alone(cov, n_iter, quartic)
        found = (rounded, gradient_alone(grad, rounded, kept, n_iter, quartic))
    assert not torch.equal(rounded, root) or n_iter > 6
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.parametrize("zeroes_constant", [False, True])
@pytest.mark.parametrize("padding", [0.0, 0.01])
@pytest.mark.parametrize(("n_iter", "quartic"), [(1, False), (3, True), (4, False), (8, False)])
@pytest.mark.parametrize("row_count", [10, 1000])
def test_what_is_around_the_root_is_differentiated_by_hand_as_by_the_chain_rule(
    row_count: int, n_iter: int, quartic: bool, padding: float, zeroes_constant: bool
) -> None:
    rows = torch.randn(2, 40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1
    mean, cov = (value.requires_grad_() for value in covariance(rows))
    settings = (row_count, padding, Root(n_iter, quartic, 1e-2, 3.0, zeroes_constant))
    found, expected = inverse_root(mean, cov, *settings)[:2], plain_root(mean, cov, *settings)
    torch.testing.assert_close(found, expected)
    cotangents = [torch.randn_like(value) for value in expected]
    of_mean, of_cov = torch.autograd.grad(expected, (mean, cov), cotangents)
    ours = torch.autograd.grad(found, (mean, cov), cotangents)
    torch.testing.assert_close(ours, (of_mean, (of_cov + of_cov.mT) / 2))
    assert (of_cov - (1 - padding) * of_cov).any() == bool(padding)


def test_whiteners_of_sets_that_do_not_vary_are_zero_and_have_no_gradient() -> None:
    cov = torch.stack([torch.eye(4), torch.zeros(4, 4)]).requires_grad_()
    mean = torch.zeros(2, 4)
    _, whitener, varies, _ = inverse_root(mean, cov, 100, 0.0, Root(3, True, 1e-5, 0.0, True))
    assert varies.tolist() == [True, False]
    whitener.sum().backward()
    assert whitener[0].any() and not whitener[1].any()
    assert cov.grad[0].any() and not cov.grad[1].any()
    _, whitener, varies, _ = inverse_root(mean, cov, 1, 0.0, Root(3, True, 1e-5, 0.0, True))
    assert whitener.any((1, 2)).all() and not varies[1]  # nothing is known from one row


@pytest.mark.parametrize("n_iter", [3, 10, 15])
def test_what_is_derived_twice_is_as_precise_as_the_root(n_iter: int) -> None:
    rows = torch.randn(2, 64, 8) * torch.logspace(0, -3, 8)
    mean, cov = covariance(rows)
    root = Root(n_iter, False, 1e-5, 0.0, True)
    exact = COMPUTE_ROOT(mean.double(), cov.double(), 64, 0.0, root)[1]
    ours, plain = COMPUTE_ROOT(mean, cov, 64, 0.0, root)[1], plain_root(mean, cov, 64, 0.0, root)[1]
    assert plain.dtype == ours.dtype == torch.float32
    assert (plain - exact).norm() <= 2 * (ours - exact).norm() + 1e-6 * exact.norm()
