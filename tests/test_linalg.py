"""Inverse square roots: the published numbers, the oracle, precision, and the stated amplification bound."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.golden_files import golden_folder, relative_error, tolerance
from timm_deconv.linalg import (
    QUARTICS,
    covariance,
    isqrt_backward,
    isqrt_eigh,
    isqrt_newton_schulz,
    isqrt_newton_schulz_uncoupled,
    isqrt_of_rows,
    isqrt_quartic,
    isqrt_with_iterates,
    shrink,
)
from timm_deconv.products import FEW_PRODUCTS

INDEX = json.loads((golden_folder() / "isqrt" / "index.json").read_text())
CASES = load_file(golden_folder() / "isqrt" / "cases.safetensors")
with safe_open(golden_folder() / "isqrt" / "cases.safetensors", "pt") as file:
    ERR32 = json.loads(file.metadata()["err32"])
METHODS = {"coupled": isqrt_newton_schulz, "uncoupled": isqrt_newton_schulz_uncoupled}
MATRICES = sorted({case.split(".")[0] for case in INDEX["cases"]})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", INDEX["cases"])
def test_iterations_give_the_published_roots_and_gradients(case: str, dtype: torch.dtype) -> None:
    matrix, method, norm, n_iter = case.split(".")
    cov = CASES[f"{matrix}.covariance"].to(dtype, copy=True).requires_grad_()
    root = METHODS[method](cov, int(n_iter), norm)
    (root * CASES[f"{matrix}.cotangent"].to(dtype)).sum().backward()
    for ours, name in ((root, f"{case}.output"), (cov.grad, f"{case}.grad")):
        error = relative_error(ours, CASES[name])
        assert error <= tolerance(dtype, ERR32[name]), f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("matrix", MATRICES)
def test_eigh_is_the_exact_inverse_root(matrix: str) -> None:
    exact = CASES[f"{matrix}.eigh"]
    if not exact.isfinite().all():
        pytest.skip("a singular matrix has no inverse root")
    assert relative_error(isqrt_eigh(CASES[f"{matrix}.covariance"]), exact) <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coupled_iteration_stays_where_the_uncoupled_one_explodes(dtype: torch.dtype) -> None:
    golden = json.loads((golden_folder() / "isqrt" / "figure7.json").read_text())
    cov = CASES["photo27.covariance"].to(torch.float32).to(dtype)
    rows = [row for row in golden["rows"] if dtype == getattr(torch, row["dtype"]) and row["iteration"] > 0]

    def residual(method: str, n_iter: int) -> float:
        root = METHODS[method](cov, n_iter)
        return float(torch.linalg.matrix_norm(root @ root @ cov - torch.eye(27, dtype=dtype)))

    for row in rows:
        if row["iteration"] <= 8:  # before rounding errors take over, the residuals are determined
            for method in METHODS:
                assert residual(method, row["iteration"]) == pytest.approx(row[method], rel=1e-3)
    assert residual("coupled", 15) < 4e-3
    assert residual("coupled", 40) < 4e-3
    assert not residual("uncoupled", 40) < 1e3


@pytest.mark.parametrize("n_iter", [1, 3, 5])
def test_n_steps_amplify_small_eigenvalues_by_at_most_1_5_to_the_n(n_iter: int) -> None:
    values = torch.tensor([1.0, 1e-3, 1e-6, 1e-12], dtype=torch.float64)
    root = isqrt_newton_schulz(values.diag(), n_iter)
    bound = 1.5**n_iter
    assert root.diagonal().max() <= bound
    assert root.diagonal()[-1] == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("root", [isqrt_newton_schulz, isqrt_newton_schulz_uncoupled, lambda cov: isqrt_eigh(cov)])
def test_roots_are_batched_and_leave_their_input_alone(root) -> None:
    cov = torch.stack([CASES["random24.covariance"], 3 * CASES["random24.covariance"]]).unsqueeze(0)
    before = cov.clone()
    batched = root(cov)
    assert torch.equal(cov, before)
    torch.testing.assert_close(batched[0, 1], root(cov[0, 1]))


def test_precision_is_float32_under_autocast_and_for_half_inputs() -> None:
    cov = CASES["random24.covariance"].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(isqrt_newton_schulz(cov), isqrt_newton_schulz(cov.clone()))
        assert isqrt_newton_schulz(cov).dtype == torch.float32
        rows = torch.randn(200, 24)
        assert covariance(rows)[1].dtype == torch.float32
    expected = isqrt_newton_schulz(cov.bfloat16().float())
    assert torch.equal(isqrt_newton_schulz(cov.bfloat16()), expected)


def test_covariance_is_that_of_torch() -> None:
    rows = 5 + torch.randn(2, 50, 7, dtype=torch.float64)
    mean, cov = covariance(rows)
    torch.testing.assert_close(mean, rows.mean(1))
    torch.testing.assert_close(cov[1], torch.cov(rows[1].T, correction=0))
    torch.testing.assert_close(covariance(rows, centred=False)[1][0], rows[0].T @ rows[0] / 50)


def test_shrinking_moves_eigenvalues_towards_their_mean() -> None:
    cov = torch.diag(torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(shrink(cov, 0.25), torch.diag(torch.tensor([3.5, 0.5])))


@pytest.mark.parametrize(("n_iter", "backward"), [(1, 0), (3, 12), (5, 26)])
def test_steps_cost_the_products_that_are_stated(n_iter: int, backward: int) -> None:
    cov = torch.eye(10).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        root, saved = isqrt_with_iterates(cov, n_iter)
    assert counter.get_total_flops() == 3 * (n_iter - 1) * 2 * 10**3
    with FlopCounterMode(display=False) as counter:
        isqrt_backward(root, root, saved, n_iter)
    assert counter.get_total_flops() == backward * 2 * 10**3


@pytest.mark.parametrize("n_iter", QUARTICS)
def test_the_quartic_costs_five_products(n_iter: int) -> None:
    cov = torch.eye(10).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        root, saved = isqrt_with_iterates(cov, n_iter, quartic=True)
        isqrt_backward(root, root, saved, n_iter, quartic=True)
    assert counter.get_total_flops() == 5 * 2 * 10**3


def newton_schulz_of_numbers(values: np.ndarray, n_iter: int) -> np.ndarray:
    y, z = values, np.ones_like(values)
    for _ in range(n_iter):
        t = (3 - z * y) / 2
        y, z = y * t, z * t
    return z


@pytest.mark.parametrize("n_iter", QUARTICS)
def test_the_quartics_are_those_of_least_squares(n_iter: int) -> None:
    nodes = (1 - np.cos((np.arange(400) + 0.5) * np.pi / 400)) / 2
    steps = newton_schulz_of_numbers(nodes, n_iter)
    powers = np.vander(nodes, 5, increasing=True) / steps[:, None]
    expected = np.linalg.lstsq(powers, np.ones(400), rcond=None)[0]
    np.testing.assert_allclose(QUARTICS[n_iter], expected, atol=1e-6)
    assert abs(powers @ QUARTICS[n_iter] - 1).max() < 0.007


@pytest.mark.parametrize(("n_iter", "tolerance"), [(2, 1e-12), (3, 0.007)])
@pytest.mark.parametrize("matrix", ["random24", "photo27", "condition1e6_32"])
def test_the_quartic_follows_the_steps(matrix: str, n_iter: int, tolerance: float) -> None:
    cov = CASES[f"{matrix}.covariance"].repeat(2, 1, 1)
    cov[1] *= 1e-6  # the root knows no scale
    for root, steps in zip(isqrt_quartic(cov, n_iter), isqrt_newton_schulz(cov, n_iter), strict=True):
        assert relative_error(root, steps) < tolerance


def test_other_numbers_of_steps_are_no_quartics() -> None:
    cov = CASES["photo27.covariance"]
    for n_iter in (1, 4, 15):
        assert torch.equal(isqrt_quartic(cov, n_iter), isqrt_newton_schulz(cov, n_iter))


@pytest.mark.parametrize("n_iter", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("exact", [isqrt_newton_schulz, isqrt_quartic])
def test_the_root_of_few_rows_is_that_of_their_covariance(eps: float, n_iter: int, exact: Callable) -> None:
    rows = CASES["photo27.covariance"].unsqueeze(0).repeat(2, 1, 1)[:, :5].mul(3).add(0.1).requires_grad_()
    cotangent = torch.randn(2, 27, 27, dtype=torch.float64)
    expected = exact(rows.mT @ rows + eps * torch.eye(27, dtype=torch.float64), n_iter)
    root = isqrt_of_rows(rows, eps, n_iter, exact is isqrt_quartic)
    assert relative_error(root.detach(), expected.detach()) < 1e-7
    grads = [torch.autograd.grad(values, rows, cotangent)[0] for values in (root, expected)]
    assert relative_error(*grads) < 1e-7


@pytest.mark.parametrize("quartic", [False, True])
def test_the_root_of_few_rows_costs_the_products_that_are_stated(quartic: bool) -> None:
    rows, n_iter = torch.randn(1, 10, 40), 3
    with FlopCounterMode(display=False) as counter:
        root = isqrt_of_rows(rows, 1e-5, n_iter, quartic)
    of_gram = 2 if quartic else 6 * (n_iter - 1)
    assert counter.get_total_flops() == 2 * (10 * 40**2 + 2 * 10**2 * 40 + of_gram * 10**3)
    expected = (isqrt_quartic if quartic else isqrt_newton_schulz)(rows.mT @ rows + 1e-5 * torch.eye(40), n_iter)
    assert relative_error(root, expected) < 1e-5


@pytest.mark.parametrize("n_iter", [1, 2, 5, 6, 7, 15])
@pytest.mark.parametrize("matrix", ["random24", "photo27", "condition1e6_32"])
@pytest.mark.parametrize("exact", [isqrt_newton_schulz, isqrt_quartic])
def test_the_root_is_differentiated_by_hand_as_by_the_chain_rule(matrix: str, n_iter: int, exact: Callable) -> None:
    cov = CASES[f"{matrix}.covariance"].unsqueeze(0).requires_grad_()
    cotangent = CASES[f"{matrix}.cotangent"].unsqueeze(0)
    (expected,) = torch.autograd.grad(exact(cov, n_iter), cov, cotangent)
    quartic = exact is isqrt_quartic
    root, saved = isqrt_with_iterates(cov.detach(), n_iter, quartic)
    assert torch.equal(root, exact(cov.detach(), n_iter))
    grad = isqrt_backward(cotangent, root, saved, n_iter, quartic)
    assert relative_error(grad, (expected + expected.mT) / 2) < 1e-7


@pytest.mark.parametrize(("n_iter", "quartic"), [(1, False), (3, True), (5, False)])
def test_roots_of_many_features_and_their_gradients_are_those_of_float64(n_iter: int, quartic: bool) -> None:
    features = 208
    assert features**3 > FEW_PRODUCTS  # convolutions in float32, matrix products in float64
    cov = covariance(torch.randn(1, 1000, features) @ torch.randn(features, features))[1]
    grad = torch.randn_like(cov)
    found = []
    for dtype in (torch.float32, torch.float64):
        root, saved = isqrt_with_iterates(cov.to(dtype), n_iter, quartic)
        found.append((root, isqrt_backward(grad.to(dtype), root, saved, n_iter, quartic)))
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("root", [isqrt_newton_schulz, isqrt_newton_schulz_uncoupled])
def test_senseless_arguments_are_refused(root) -> None:
    with pytest.raises(ValueError, match="n_iter=0: at least one Newton-Schulz step"):
        root(torch.eye(3), 0)
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        root(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="norm='max'"):
        root(torch.eye(3), norm="max")


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
    root, saved = isqrt_with_iterates(cov, n_iter, quartic)
    expected = (root, isqrt_backward(grad, root, saved, n_iter, quartic))
    with LowPrecision(10):
        rounded, saved = isqrt_with_iterates(cov, n_iter, quartic)
        found = (rounded, isqrt_backward(grad, rounded, saved, n_iter, quartic))
    assert not torch.equal(rounded, root) or n_iter > 6
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 5e-3 * exact.norm()
