"""Inverse roots of covariances by coupled Newton-Schulz steps or their quartic, and the gradient by hand.

Ye et al., Network Deconvolution, ICLR 2020, section 4.5.3. `timm_deconv.linalg` has the same as plain formulae.
"""

from typing import Any

import torch
from torch import Tensor

from timm_deconv.linalg import (
    QUARTICS,
    Quartic,
    eye_like,
    full_precision,
    isqrt_newton_schulz,
    isqrt_quartic,
    promote,
    symmetric_part,
    widest,
)

from .onednn import rows_times, rows_times_plus
from .operation import Operation

__all__ = ["inverse_root", "inverse_root_backward"]

FEW_STEPS = 6
"""Newton-Schulz steps run in float32: they amplify weak directions at most 1.5 ** 6 times, harmless even in TF32."""


def _inverse_root(cov: Tensor, n_iter: int, quartic: bool) -> tuple[Tensor, list[Tensor]]:
    """Approximate the inverse square root of covariances, and keep what `inverse_root_backward` needs beside it.

    Args:
        cov: (S, F, F), symmetric, positive definite; computed in float32 or better, in float64 beyond 6 steps.
        n_iter: Newton-Schulz steps, at 3 (n_iter - 1) products of F^3.
        quartic: take the polynomial nearest to 2 or 3 steps instead, at 2 products.

    Returns:
        root (S, F, F), and [norms (S, 1, 1), cov / norms, ...]. The iterates of the steps are not among them: they are
        computed again, as they can be more than a network's activations.
    """
    with full_precision(cov):
        wide = _widen(promote(cov), n_iter)
        scale = torch.linalg.matrix_norm(wide, keepdim=True)
        first = wide / scale
        kept: list[Tensor] = []
        if coefficients := _coefficients(n_iter, quartic):
            *kept, root = _quartic_iterates(first, coefficients)
        else:
            root = _newton_schulz_root(first, n_iter)
        return (root / scale.sqrt()).to(promote(cov).dtype).contiguous(), [scale, first, *kept]


def _inverse_root_backward(grad: Tensor, root: Tensor, kept: list[Tensor], n_iter: int, quartic: bool) -> Tensor:
    """Compute the gradient (S, F, F) with respect to the covariances, symmetric, from that of the roots.

    The quartic costs 3 products, and up to 6 steps cost 7 (n_iter - 1) - 2. More steps cost 9 (n_iter - 1) - 2: the
    cheaper form would let rounding errors grow.

    Args:
        grad: (S, F, F), of the roots.
        root, kept: what `inverse_root` gave.
        n_iter, quartic: those of the forward pass.
    """
    scale, first, *powers = kept
    with full_precision(root):
        wide = grad.to(scale.dtype)
        scaled = wide / scale.sqrt()
        if coefficients := _coefficients(n_iter, quartic):
            grad_first = _quartic_backward(scaled, first, powers, coefficients)
        else:
            backward = _symmetric_backward if n_iter <= FEW_STEPS else _chain_rule_backward
            grad_first = backward(scaled, first, _coupled_pairs(first, n_iter)[::-1])
        through_scale = (grad_first * first).addcmul(wide, root.to(wide.dtype), value=0.5).sum((1, 2), keepdim=True)
        return (torch.addcmul(grad_first, first, through_scale, value=-1) / scale).to(root.dtype).contiguous()


def _widen(cov: Tensor, n_iter: int) -> Tensor:
    """Convert to float64 for more steps than FEW_STEPS, where the device has it: in TF32 these can diverge."""
    return cov if n_iter <= FEW_STEPS else cov.to(widest(cov.device))


def _coefficients(n_iter: int, quartic: bool) -> Quartic | None:
    """Return those of the polynomial that is computed in place of the steps; None for the steps."""
    return QUARTICS.get(n_iter) if quartic else None


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


def _fake_root(cov: Tensor, n_iter: int, quartic: bool) -> tuple[Tensor, list[Tensor]]:
    root = promote(cov).new_empty(cov.shape)
    wide = _widen(root, n_iter)
    powers = [torch.empty_like(wide) for _ in range(3 if _coefficients(n_iter, quartic) else 1)]
    return root, [wide.new_empty(cov.shape[0], 1, 1), *powers]


def _fake_backward(grad: Tensor, root: Tensor, kept: list[Tensor], n_iter: int, quartic: bool) -> Tensor:
    return root.new_empty(root.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    cov, ctx.n_iter, ctx.quartic = inputs
    root, kept = output
    ctx.save_for_backward(cov, root, *kept)


def _backward(ctx: Any, grad: Tensor, _: list[Tensor | None]) -> tuple[Tensor, None, None]:
    cov, root, *kept = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # by create_graph=True
        plain = (isqrt_quartic if ctx.quartic else isqrt_newton_schulz)(cov, ctx.n_iter)
        (grad_cov,) = torch.autograd.grad(plain, cov, grad, create_graph=True)
        return grad_cov, None, None
    return inverse_root_backward(grad, root, kept, ctx.n_iter, ctx.quartic).to(cov.dtype), None, None


inverse_root = Operation(_inverse_root, "(Tensor cov, SymInt n_iter, bool quartic) -> (Tensor, Tensor[])")
inverse_root.register_fake(_fake_root)
inverse_root.register_autograd(_backward, setup_context=_remember)

inverse_root_backward = Operation(
    _inverse_root_backward, "(Tensor grad, Tensor root, Tensor[] kept, SymInt n_iter, bool quartic) -> Tensor"
)
inverse_root_backward.register_fake(_fake_backward)
