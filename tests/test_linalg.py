"""Inverse square roots: the published numbers, the oracle, precision, and the stated amplification bound."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.baselines import isqrt_newton_schulz_uncoupled
from tests.golden_files import golden_folder, relative_error, tolerance
from timm_deconv.linalg import QUARTICS, covariance, isqrt_newton_schulz, isqrt_quartic, shrink

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


@pytest.mark.parametrize("matrix", ["random24", "photo27"])
def test_many_steps_give_the_exact_inverse_root(matrix: str) -> None:
    values, vectors = torch.linalg.eigh(CASES[f"{matrix}.covariance"])
    exact = (vectors * values.rsqrt()) @ vectors.mT
    assert relative_error(CASES[f"{matrix}.eigh"], exact) <= 1e-7
    assert relative_error(isqrt_newton_schulz(CASES[f"{matrix}.covariance"], 40), exact) <= 1e-6


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


@pytest.mark.parametrize("root", [isqrt_newton_schulz, isqrt_newton_schulz_uncoupled, isqrt_quartic])
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


def test_shrinking_moves_eigenvalues_towards_their_mean() -> None:
    cov = torch.diag(torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(shrink(cov, 0.25), torch.diag(torch.tensor([3.5, 0.5])))


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


@pytest.mark.parametrize("root", [isqrt_newton_schulz, isqrt_newton_schulz_uncoupled])
def test_senseless_arguments_are_refused(root) -> None:
    with pytest.raises(ValueError, match="n_iter=0: at least one Newton-Schulz step"):
        root(torch.eye(3), 0)
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        root(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="norm='max'"):
        root(torch.eye(3), norm="max")
