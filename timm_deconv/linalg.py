"""Covariances and their inverse square roots, as plain formulae.

Coupled Newton-Schulz iteration: Ye et al., Network Deconvolution, ICLR 2020, section 4.5.3; Higham, Functions of
Matrices, eq. 6.35. In place of two or three of its steps there is a polynomial of fourth degree. Everything is a pure
function of tensors, batched over leading dimensions, differentiable, free of host synchronisation, and computed in
float32 or better whatever the autocast mode. What layers run are the operations of `timm_deconv.kernels`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "QUARTICS",
    "Norm",
    "Quartic",
    "covariance",
    "eye_like",
    "full_precision",
    "isqrt_newton_schulz",
    "isqrt_quartic",
    "matrix_norm",
    "promote",
    "shrink",
    "symmetric_part",
    "to_double",
    "widest",
]

Norm = Literal["frobenius", "trace"]

Quartic = tuple[float, float, float, float, float]

WITHOUT_DOUBLE = ("mps",)
"""Kinds of devices that have no float64."""

QUARTICS: dict[int, Quartic] = {
    2: (2.25, -2.4375, 1.6875, -0.5625, 0.0625),
    3: (3.354073, -8.514909, 14.442864, -12.463911, 4.186057),
}
"""Coefficients, the constant first, of the polynomial of fourth degree nearest to so many Newton-Schulz steps from a
matrix of norm 1. Two steps compute such a polynomial; that of three is found by least squares of the relative error at
Chebyshev nodes of [0, 1], where it is at most 0.7 %."""


def covariance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean (..., F) and covariance (..., F, F), divided by R, of rows (..., R, F), in float32 or better."""
    with full_precision(rows):
        rows = promote(rows)
        mean = rows.mean(-2, keepdim=True)
        deviations = rows - mean
        return mean.squeeze(-2), deviations.mT @ deviations / rows.shape[-2]


def shrink(cov: Tensor, share: float) -> Tensor:
    """Shrink covariances (..., F, F) towards their mean variance: (1 - share) cov + share tr(cov)/F I.

    The estimate of a covariance from fewer rows than features is singular; shrinking keeps its inverse root of
    ordinary size (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004).
    """
    variance = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return (1 - share) * cov + share * variance * eye_like(cov)


def isqrt_newton_schulz(cov: Tensor, n_iter: int = 5, norm: Norm = "frobenius") -> Tensor:
    """Approximate the inverse square root of symmetric positive definite matrices by coupled Newton-Schulz steps.

    With A = cov / ||cov||, Y = A and Z = I, a step is T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z; the result is
    Z / sqrt(||cov||). It converges while ||I - A|| < 1, true for every symmetric positive definite matrix, either norm.

    Args:
        cov: (..., F, F), any floating dtype; computed in float32 or better.
        n_iter: coupled steps; together they cost 3 (n_iter - 1) F x F products, as the first step multiplies by the
            identity and the last needs no Y.
        norm: 'frobenius' (published) or 'trace'.

    Returns:
        (..., F, F), in float32 or better. An eigenvalue much smaller than ||cov|| is amplified by at most
        1.5 ** n_iter.

    Raises:
        ValueError: n_iter < 1, an unknown norm, or the last two dimensions differ.
    """
    check_square(cov)
    check_n_iter(n_iter)
    with full_precision(cov):
        cov = promote(cov)
        scale = matrix_norm(cov, norm)
        y, eye = cov / scale, eye_like(cov)
        z = t = 1.5 * eye - 0.5 * y
        for _ in range(n_iter - 1):
            y = y @ t
            t = 1.5 * eye - 0.5 * z @ y
            z = t @ z
        return z / scale.sqrt()


def isqrt_quartic(cov: Tensor, n_iter: int = 3) -> Tensor:
    """Compute the polynomial of fourth degree nearest to `isqrt_newton_schulz`, in the Frobenius norm; `QUARTICS`.

    Args:
        cov: (..., F, F), any floating dtype; computed in float32 or better.
        n_iter: steps that it follows, 2 or 3; for any other number it is `isqrt_newton_schulz` itself.

    Returns:
        (..., F, F), in float32 or better; 2 products instead of 3 (n_iter - 1).

    Raises:
        ValueError: n_iter < 1, or the last two dimensions differ.
    """
    check_n_iter(n_iter)
    if n_iter not in QUARTICS:
        return isqrt_newton_schulz(cov, n_iter)
    check_square(cov)
    with full_precision(cov):
        cov = promote(cov)
        scale = matrix_norm(cov, "frobenius")
        c0, c1, c2, c3, c4 = QUARTICS[n_iter]
        a, eye = cov / scale, eye_like(cov)
        square = a @ a
        return (c0 * eye + c1 * a + square @ (c2 * eye + c3 * a + c4 * square)) / scale.sqrt()


def matrix_norm(matrices: Tensor, norm: Norm) -> Tensor:
    """Compute the norms (..., 1, 1) of matrices (..., F, F); ValueError for an unknown one."""
    if norm == "frobenius":
        return torch.linalg.matrix_norm(matrices, keepdim=True)
    if norm == "trace":
        return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    raise ValueError(f"norm={norm!r}: choose 'frobenius' or 'trace'")


def eye_like(matrices: Tensor) -> Tensor:
    """Return the identity (F, F) in the dtype and on the device of matrices (..., F, F)."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def symmetric_part(matrices: Tensor) -> Tensor:
    """Compute (M + M^T) / 2 of matrices (..., F, F)."""
    return torch.lerp(matrices, matrices.mT, 0.5)


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of a tensor of any shape; none where there is none to leave."""
    device = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False) if torch.compiler.is_compiling() else _WithoutAutocast(device)


class _WithoutAutocast(AbstractContextManager[None]):
    """What `torch.autocast(device, enabled=False)` does under autocast; that takes as long as four operators."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.device, True)


def promote(tensor: Tensor) -> Tensor:
    """Convert a tensor (...) to float32, unless it is of float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has no such numbers."""
    return torch.float32 if device.type in WITHOUT_DOUBLE else torch.float64


def to_double(tensor: Tensor) -> Tensor:
    """Convert a tensor (...) to float64, on the processor where the tensor's device has no such numbers."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_DOUBLE else tensor).double()


def check_square(matrices: Tensor) -> None:
    """Raise ValueError unless the last two dimensions of (..., F, F) are equal."""
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"matrices of shape {tuple(matrices.shape)}: the last two dimensions must be equal")


def check_n_iter(n_iter: int) -> None:
    """Raise ValueError unless there is at least one step."""
    if isinstance(n_iter, bool) or not isinstance(n_iter, int) or n_iter < 1:
        raise ValueError(
            f"n_iter={n_iter!r}: at least one Newton-Schulz step is needed; the paper uses 5, or 15 for the first layer"
        )
