"""Whiteners: inverse roots of regularised covariances by coupled Newton-Schulz steps or their quartic, and the gradient
by hand.

Ye et al., Network Deconvolution, ICLR 2020, section 4.5.3. `timm_deconv.linalg` has the same as plain formulae.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_deconv.linalg import (
    QUARTICS,
    Quartic,
    eye_like,
    full_precision,
    isqrt_newton_schulz,
    isqrt_quartic,
    shrink,
    symmetric_part,
    widest,
)

from .onednn import rows_times, rows_times_plus
from .operation import Operation

__all__ = ["LEAST_VARIANCE", "Root", "inverse_root", "inverse_root_backward"]

FEW_STEPS = 6
"""Newton-Schulz steps run in float32: they amplify weak directions at most 1.5 ** 6 times, harmless even in TF32."""

LEAST_VARIANCE = 1e-5
"""Part of eps below which a set of features is taken not to vary at all."""


class Root(NamedTuple):
    """How a whitener is made of a covariance.

    Attributes:
        n_iter: Newton-Schulz steps, at 3 (n_iter - 1) products of F^3.
        quartic: take the polynomial nearest to 2 or 3 steps instead, at 2 products.
        eps: added to the diagonal.
        min_rows: rows, in multiples of F, below which the covariance is shrunk towards its mean variance.
        zeroes_constant: zero the whiteners of sets whose features do not vary. There is nothing to whiten there, and
            only eps would be inverted: deviations stay zero, but each layer would multiply gradients by eps ** -0.5.
            No output changes by more than LEAST_VARIANCE ** 0.5 of a deviation.
    """

    n_iter: int
    quartic: bool
    eps: float
    min_rows: float
    zeroes_constant: bool

    @property
    def numbers(self) -> list[float]:
        """The choices as an operator takes them."""
        return [float(value) for value in self]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> "Root":
        """Return the choices that `numbers` was made of."""
        n_iter, quartic, eps, min_rows, zeroes_constant = numbers
        return cls(int(n_iter), bool(quartic), eps, min_rows, bool(zeroes_constant))

    @property
    def coefficients(self) -> Quartic | None:
        """Those of the polynomial that is computed in place of the steps; None for the steps."""
        return QUARTICS.get(self.n_iter) if self.quartic else None

    def shrinkage(self, row_count: int, features: int) -> float:
        """Return the share of the mean variance in the covariance of so many rows and features."""
        wanted = self.min_rows * features
        return 1 - row_count / wanted if row_count < wanted else 0.0


def _inverse_root(
    mean: Tensor, cov: Tensor, row_count: int, padding: float, root: Root
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Estimate mean and whitener from the moments of rows, and keep what `inverse_root_backward` needs beside these.

    Args:
        mean: (S, F). cov: (S, F, F), divided by the rows; in float32 or float64. Computed in that, or in float64 beyond
            6 steps.
        row_count: R. One row has no variance, but others may differ from it: then no whitener is zeroed.
        padding: the weight of zeros that are not among the rows.
        root: how.

    Returns:
        mean (S, F) and whitener (S, F, F) with padding counted; bool (S,), whether a set's features vary at all; and
        [norms (S, 1, 1) of the regularised covariances, infinite where the whitener is zero; these / norms; ...]. The
        iterates of the steps are not among them: they are computed again, as they can be more than a network's
        activations.
    """
    with full_precision(cov):
        mean, cov = _count_padding(mean, cov, padding)
        varies = cov.diagonal(dim1=-2, dim2=-1).mean(-1) > LEAST_VARIANCE * root.eps
        wide = _widen(_regularise(cov, row_count, root), root.n_iter)
        scale = torch.linalg.matrix_norm(wide, keepdim=True)
        first = wide / scale
        kept: list[Tensor] = []
        if root.coefficients:
            *kept, whitener = _quartic_iterates(first, root.coefficients)
        else:
            whitener = _newton_schulz_root(first, root.n_iter)
        if root.zeroes_constant and row_count > 1:
            scale = scale / varies[:, None, None]  # infinite where whitener and gradient are to be zero
        return mean, (whitener / scale.sqrt()).to(cov.dtype).contiguous(), varies, [scale, first, *kept]


def _inverse_root_backward(
    grad_mean: Tensor,
    grad_whitener: Tensor,
    mean: Tensor,
    whitener: Tensor,
    kept: list[Tensor],
    row_count: int,
    padding: float,
    root: Root,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the moments, the covariance's symmetric, from those of what `inverse_root` gave.

    The quartic costs 3 products, and up to 6 steps cost 7 (n_iter - 1) - 2. More steps cost 9 (n_iter - 1) - 2: the
    cheaper form would let rounding errors grow.

    Args:
        grad_mean: (S, F). grad_whitener: (S, F, F).
        mean, whitener, kept: what `inverse_root` gave.
        row_count, padding, root: what it was given.

    Returns:
        the mean that it was given (S, F), and the gradients of that mean and of the covariance (S, F, F).
    """
    scale, first, *powers = kept
    with full_precision(whitener):
        wide = grad_whitener.to(scale.dtype)
        scaled = wide / scale.sqrt()
        if root.coefficients:
            grad_first = _quartic_backward(scaled, first, powers, root.coefficients)
        else:
            backward = _symmetric_backward if root.n_iter <= FEW_STEPS else _chain_rule_backward
            grad_first = backward(scaled, first, _coupled_pairs(first, root.n_iter)[::-1])
        through_scale = (grad_first * first).addcmul(wide, whitener.to(wide.dtype), value=0.5)
        grad_cov = grad_first.addcmul(first, through_scale.sum((1, 2), keepdim=True), value=-1)
        grad_cov = (grad_cov / scale).to(whitener.dtype)
        if share := root.shrinkage(row_count, whitener.shape[-1]):  # is its own adjoint
            grad_cov = shrink(grad_cov, share)
        return _count_padding_backward(mean, grad_mean, grad_cov.contiguous(), padding)


def plain_root(mean: Tensor, cov: Tensor, row_count: int, padding: float, root: Root) -> tuple[Tensor, Tensor]:
    """Do what `inverse_root` does, for mean and whitener, by operations that can be derived twice."""
    with full_precision(cov):
        mean, cov = _count_padding(mean, cov, padding)
        isqrt = isqrt_quartic if root.quartic else isqrt_newton_schulz
        whitener = isqrt(_widen(_regularise(cov, row_count, root), root.n_iter), root.n_iter).to(cov.dtype)
        if root.zeroes_constant and row_count > 1:
            whitener = whitener * (cov.diagonal(dim1=-2, dim2=-1).mean(-1) > LEAST_VARIANCE * root.eps)[:, None, None]
        return mean, whitener


def _count_padding(mean: Tensor, cov: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Compute mean (S, F) and covariance (S, F, F) of pixels of which a share is zero padding, from the image's own."""
    if share:
        outer = (mean.unsqueeze(-1), mean.unsqueeze(-2))
        cov = torch.baddbmm(cov, *outer, beta=1 - share, alpha=share * (1 - share))
    return (1 - share) * mean, cov  # never the mean itself, as no operator may return its argument


def _count_padding_backward(
    mean: Tensor, grad_mean: Tensor, grad_cov: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image's own mean (S, F), and its and the covariance's gradients, from what `_count_padding` gave."""
    if not share:
        return mean.clone(), grad_mean.clone(), grad_cov
    rows, grads = mean.unsqueeze(1), grad_mean.unsqueeze(1)
    grad_mean = torch.baddbmm(grads, rows, grad_cov, beta=1 - share, alpha=2 * share).squeeze(1)
    return mean / (1 - share), grad_mean, (1 - share) * grad_cov


def _regularise(cov: Tensor, row_count: int, root: Root) -> Tensor:
    """Shrink covariances (S, F, F) where the rows are too few, and add eps to the diagonal."""
    if share := root.shrinkage(row_count, cov.shape[-1]):
        cov = shrink(cov, share)
    return torch.add(cov, eye_like(cov), alpha=root.eps)


def _widen(cov: Tensor, n_iter: int) -> Tensor:
    """Convert to float64 for more steps than FEW_STEPS, where the device has it: in TF32 these can diverge."""
    return cov if n_iter <= FEW_STEPS else cov.to(widest(cov.device))


def _quartic_iterates(a: Tensor, coefficients: Quartic) -> list[Tensor]:
    """Compute A^2, U = c2 I + c3 A + c4 A^2 and the polynomial c0 I + c1 A + A^2 U of A (S, F, F)."""
    c0, c1, c2, c3, c4 = coefficients
    eye = eye_like(a)
    square = rows_times(a, a, symmetric=True)
    # no product is written to: selective checkpointing may keep it
    upper = torch.add(torch.add(c3 * a, square, alpha=c4), eye, alpha=c2)
    return [square, upper, torch.add(rows_times_plus(square, upper, a, beta=c1, symmetric=True), eye, alpha=c0)]


def _quartic_backward(grad: Tensor, a: Tensor, powers: list[Tensor], coefficients: Quartic) -> Tensor:
    """Compute the gradient of the polynomial with respect to A; all matrices are polynomials of A and thus symmetric.

    With G the symmetric cotangent, P = G A^2 and the cotangent H = (G U + c4 P) of A^2, it is the symmetric part of
    c1 G + c3 P + 2 H A, H being made symmetric first.
    """
    square, upper = powers
    _, c1, _, c3, c4 = coefficients
    grad = symmetric_part(grad)
    product = rows_times(grad, square, symmetric=True)
    grad_square = symmetric_part(rows_times_plus(grad, upper, product, beta=c4, symmetric=True))
    grad = (c1 * grad).add_(product, alpha=c3)
    return symmetric_part(rows_times_plus(grad_square, a, grad, alpha=2, symmetric=True))


def _newton_schulz_root(a: Tensor, n_iter: int) -> Tensor:
    """Compute Z after n_iter steps from Y = A (S, F, F) of norm 1 and Z = I."""
    pairs = _coupled_pairs(a, n_iter)
    return rows_times(_factor(*pairs[-1]), pairs[-1][1], symmetric=True) if pairs else _first_factor(a)


def _coupled_pairs(a: Tensor, n_iter: int) -> list[tuple[Tensor, Tensor]]:
    """Compute (Y, Z) after every step but the last from Y = A of norm 1; 3 (n_iter - 1) - 2 products."""
    if n_iter == 1:
        return []
    z = _first_factor(a)
    pairs = [(rows_times(a, z, symmetric=True), z)]
    for _ in range(n_iter - 2):
        y, z = pairs[-1]
        t = _factor(y, z)
        pairs.append((rows_times(y, t, symmetric=True), rows_times(t, z, symmetric=True)))
    return pairs


def _first_factor(a: Tensor) -> Tensor:
    """Compute T for Y = A and Z = I."""
    return (1.5 * eye_like(a)).sub(a, alpha=0.5)


def _factor(y: Tensor, z: Tensor) -> Tensor:
    """Compute T = (3 I - Z Y) / 2."""
    return rows_times_plus(z, y, eye_like(y).expand_as(y), beta=1.5, alpha=-0.5, symmetric=True)


def _symmetric_backward(grad: Tensor, first: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the gradient of the last Z with respect to the first Y; `pairs`: (Y, Z) of every step, the last first.

    All iterates are polynomials of one symmetric matrix: they commute, and of cotangents the symmetric part counts.
    With G_z and G_y the symmetric cotangents of Z' and Y' behind a step, P = G_z Z, Q = Y G_y and G_t = P + Q, the
    ones before it are the symmetric parts of (3 G_z - (P + G_t) Y) / 2 and (3 G_y - Z (Q + G_t)) / 2.
    """
    grad_z, grad_y = symmetric_part(grad), None
    for y, z in pairs:
        p = rows_times(grad_z, z, symmetric=True)
        if grad_y is None:
            grad_y = symmetric_part(rows_times(z, p)).mul_(-0.5)
            grad_z = symmetric_part(rows_times_plus(p, y, grad_z, beta=1.5, alpha=-1, symmetric=True))
        else:
            q = rows_times(y, grad_y, symmetric=True)
            grad_t = p + q
            grad_y = symmetric_part(rows_times_plus(z, q + grad_t, grad_y, beta=1.5, alpha=-0.5))
            grad_z = symmetric_part(rows_times_plus(p + grad_t, y, grad_z, beta=1.5, alpha=-0.5, symmetric=True))
    if grad_y is None:
        return -0.5 * grad_z
    last = symmetric_part(rows_times_plus(grad_y, first, grad_y, beta=1.5, alpha=-1, symmetric=True))
    return last.sub_(grad_z, alpha=0.5)


def _chain_rule_backward(grad: Tensor, first: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the same without use of symmetry: what autograd does, stable for any number of steps."""
    eye = eye_like(first)
    grad_z, grad_y = grad, torch.zeros_like(grad)
    for y, z in pairs:
        t = 1.5 * eye - 0.5 * z @ y
        grad_t = grad_z @ z.mT + y.mT @ grad_y
        grad_y = grad_y @ t.mT - 0.5 * z.mT @ grad_t
        grad_z = t.mT @ grad_z - 0.5 * grad_t @ y.mT
    t = 1.5 * eye - 0.5 * first
    return symmetric_part(grad_y @ t - 0.5 * (grad_z + first @ grad_y))


def _fake_root(
    mean: Tensor, cov: Tensor, row_count: int, padding: float, root: Root
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    wide = _widen(cov, root.n_iter)
    kept = [wide.new_empty(cov.shape) for _ in range(3 if root.coefficients else 1)]
    varies = cov.new_empty(cov.shape[:1], dtype=torch.bool)
    norms = wide.new_empty(cov.shape[0], 1, 1)
    return mean.new_empty(mean.shape), cov.new_empty(cov.shape), varies, [norms, *kept]


def _fake_backward(
    grad_mean: Tensor,
    grad_whitener: Tensor,
    mean: Tensor,
    whitener: Tensor,
    kept: list[Tensor],
    row_count: int,
    padding: float,
    root: Root,
) -> tuple[Tensor, Tensor, Tensor]:
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape), whitener.new_empty(whitener.shape)


def _backward(
    grads: Sequence[Tensor],
    kept: list[Tensor],
    mean: Tensor,
    cov: Tensor,
    row_count: int,
    padding: float,
    root: Root,
) -> tuple[Tensor, Tensor]:
    whitened_mean, whitener, *kept = kept
    _, *of_moments = inverse_root_backward(*grads[:2], whitened_mean, whitener, kept, row_count, padding, root)
    return of_moments[0], of_moments[1]


inverse_root = Operation(
    _inverse_root,
    "(Tensor mean, Tensor cov, SymInt row_count, float padding, float[] root) -> (Tensor, Tensor, Tensor, Tensor[])",
)
inverse_root.register_fake(_fake_root)
inverse_root.register_autograd(
    _backward, plain_root, keep=lambda mean, whitener, varies, kept: [mean, whitener, *kept]
)

inverse_root_backward = Operation(
    _inverse_root_backward,
    "(Tensor grad_mean, Tensor grad_whitener, Tensor mean, Tensor whitener, Tensor[] kept, SymInt row_count,"
    " float padding, float[] root) -> (Tensor, Tensor, Tensor)",
)
inverse_root_backward.register_fake(_fake_backward)
