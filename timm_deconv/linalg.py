"""Covariances and their inverse square roots.

Coupled Newton-Schulz iteration: Ye et al., Network Deconvolution, ICLR 2020, section 4.5.3; Higham, Functions of
Matrices, eq. 6.35. In place of two or three of its steps there is a polynomial of fourth degree. Everything is a pure
function of tensors, batched over leading dimensions, differentiable, free of host synchronisation, and computed in
float32 or better whatever the autocast mode.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from timm_deconv.products import inner_products, rows_times, rows_times_plus

__all__ = [
    "Norm",
    "covariance",
    "full_precision",
    "isqrt_eigh",
    "isqrt_newton_schulz",
    "isqrt_newton_schulz_uncoupled",
    "isqrt_of_rows",
    "isqrt_quartic",
    "promote",
    "shrink",
    "to_double",
    "widest",
]

Norm = Literal["frobenius", "trace"]

Pair = tuple[Tensor, Tensor]
"""p(eps) (B, 1, 1) and Q (B, R, R), see `isqrt_of_rows`."""

Quartic = tuple[float, float, float, float, float]

WITHOUT_DOUBLE = ("mps",)
"""Kinds of devices that have no float64."""

FEW_STEPS = 6
"""Newton-Schulz steps run in float32: they amplify weak directions at most 1.5 ** 6 times, harmless even in TF32."""

QUARTICS: dict[int, Quartic] = {
    2: (2.25, -2.4375, 1.6875, -0.5625, 0.0625),
    3: (3.354073, -8.514909, 14.442864, -12.463911, 4.186057),
}
"""Coefficients, the constant first, of the polynomial of fourth degree nearest to so many Newton-Schulz steps from a
matrix of norm 1. What two steps compute is one; of three it is that of least squares of the relative error at Chebyshev
nodes of [0, 1], where it is at most 0.7 %."""


def covariance(rows: Tensor, *, centred: bool = True, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and covariance of sampled rows.

    Args:
        rows: (..., R, F), R samples of F features; any floating dtype.
        centred: False leaves the second moment uncentred, as the published channel whitening does.
        overwrite: centre the rows in place: fresh memory can cost more than all of the arithmetic.

    Returns:
        mean (..., F) and covariance (..., F, F), divided by R, in float32 or better. One product of R F^2.
    """
    with full_precision(rows):
        rows = promote(rows)
        mean = rows.mean(-2, keepdim=True)
        deviations = (rows.sub_(mean) if overwrite else rows - mean) if centred else rows
        samples = deviations.reshape(-1, *rows.shape[-2:])
        cov = inner_products(samples, samples) / rows.shape[-2]
        return mean.squeeze(-2), cov.reshape(*rows.shape[:-2], *cov.shape[-2:])


def shrink(cov: Tensor, share: float) -> Tensor:
    """Shrink covariances (..., F, F) towards their mean variance: (1 - share) cov + share tr(cov)/F I.

    The estimate of a covariance from fewer rows than features is singular; shrinking keeps its inverse root of
    ordinary size (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004).
    """
    variance = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return (1 - share) * cov + share * variance * _eye_like(cov)


def isqrt_newton_schulz(cov: Tensor, n_iter: int = 5, norm: Norm = "frobenius") -> Tensor:
    """Approximate inverse square root of symmetric positive definite matrices, by coupled Newton-Schulz steps.

    With A = cov / ||cov||, Y = A and Z = I, a step is T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z; the result is
    Z / sqrt(||cov||). It converges while ||I - A|| < 1, true for every symmetric positive definite matrix, either norm.

    Args:
        cov: (..., F, F), any floating dtype; computed in float32 or better, in float64 with more than 6 steps.
        n_iter: coupled steps; together they cost 3 (n_iter - 1) F x F products, as the first step multiplies by the
            identity and the last needs no Y.
        norm: 'frobenius' (published) or 'trace'.

    Returns:
        (..., F, F), in float32 or better. An eigenvalue much smaller than ||cov|| is amplified by at most
        1.5 ** n_iter.

    Raises:
        ValueError: n_iter < 1, an unknown norm, or the last two dimensions differ.
    """
    _check_square(cov)
    _check_n_iter(n_iter)
    with full_precision(cov):
        cov = promote(cov)
        wide = _widen(cov, n_iter)
        scale = _norm(wide, norm)
        root = _newton_schulz_root((wide / scale).reshape(-1, *cov.shape[-2:]), n_iter)
        return (root.reshape(cov.shape) / scale.sqrt()).to(cov.dtype)


def isqrt_quartic(cov: Tensor, n_iter: int = 3) -> Tensor:
    """The polynomial of fourth degree nearest to `isqrt_newton_schulz`, in the Frobenius norm; `QUARTICS`.

    Args:
        cov: (..., F, F), any floating dtype; computed in float32 or better.
        n_iter: steps that it follows, 2 or 3; it is `isqrt_newton_schulz` itself of any other number.

    Returns:
        (..., F, F), in float32 or better; 2 products instead of 3 (n_iter - 1).

    Raises:
        ValueError: n_iter < 1, or the last two dimensions differ.
    """
    _check_n_iter(n_iter)
    if n_iter not in QUARTICS:
        return isqrt_newton_schulz(cov, n_iter)
    _check_square(cov)
    with full_precision(cov):
        matrices = promote(cov).reshape(-1, *cov.shape[-2:])
        return isqrt_with_iterates(matrices, n_iter, True)[0].reshape(cov.shape)


def isqrt_of_rows(rows: Tensor, eps: float, n_iter: int = 5, quartic: bool = False) -> Tensor:
    """`isqrt_newton_schulz`, or `isqrt_quartic`, of rows^T rows + eps I by products of R x R instead of F x F.

    A polynomial p of that matrix is p(eps) I + rows^T Q rows, where Q is a polynomial of the Gram matrix rows rows^T.
    The computation runs on pairs (p(eps), Q).

    Args:
        rows: (..., R, F), any floating dtype; worth it for R much smaller than F.
        eps: positive.
        n_iter, quartic: which root.

    Returns:
        (..., F, F), in float32 or better; R F^2 + 2 R^2 F + 6 (n_iter - 1) R^3 products, of the quartic 2 R^3.
    """
    _check_n_iter(n_iter)
    with full_precision(rows):
        wide = _widen(promote(rows).reshape(-1, *rows.shape[-2:]), n_iter)
        gram = wide @ wide.mT
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        scale = (gram.square().sum((1, 2), keepdim=True) + 2 * eps * trace + rows.shape[-1] * eps**2).sqrt()
        gram, first = gram / scale, (eps / scale, _eye_like(gram).expand_as(gram))
        if coefficients := _coefficients(n_iter, quartic):
            root = _quartic_of_pair(first, gram, coefficients)
        else:
            root = _newton_schulz_of_pair(first, gram, n_iter)
        of_eps, core = (part / scale.sqrt() for part in root)
        whole = wide.mT @ (core / scale) @ wide
        whole = whole + of_eps * _eye_like(whole)  # not in place: selective checkpointing may keep the product
        return whole.to(promote(rows).dtype).reshape(*rows.shape[:-2], *whole.shape[-2:])


def _newton_schulz_of_pair(y: Pair, gram: Tensor, n_iter: int) -> Pair:
    z = t = _newton_schulz_factor(y)
    for _ in range(n_iter - 1):
        y = _pair_product(y, t, gram)
        t = _newton_schulz_factor(_pair_product(z, y, gram))
        z = _pair_product(t, z, gram)
    return z


def _newton_schulz_factor(pair: Pair) -> Pair:
    """T = (3 I - P) / 2 of the pair of P."""
    return 1.5 - 0.5 * pair[0], -0.5 * pair[1]


def _quartic_of_pair(first: Pair, gram: Tensor, coefficients: Quartic) -> Pair:
    """Of A itself, whose pair is (eps, I); that of A^2 is (eps^2, 2 eps I + G)."""
    c0, c1, c2, c3, c4 = coefficients
    eps, eye = first
    square = eps**2, 2 * eps * eye + gram
    upper = c2 + c3 * eps + c4 * square[0], c3 * eye + c4 * square[1]
    product = _pair_product(square, upper, gram)
    return c0 + c1 * eps + product[0], c1 * eye + product[1]


def _pair_product(left: Pair, right: Pair, gram: Tensor) -> Pair:
    """The pair (a b, a Q_b + b Q_a + Q_a G Q_b) of a product of polynomials of rows^T rows."""
    (a, of_a), (b, of_b) = left, right
    return a * b, torch.baddbmm(a * of_b + b * of_a, torch.bmm(of_a, gram), of_b)


def isqrt_with_iterates(cov: Tensor, n_iter: int, quartic: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The root of (B, F, F) in the Frobenius norm, of steps or `quartic`, and what `isqrt_backward` needs beside it.

    Of steps that is not their iterates: they are computed again, as they can be more than the activations.
    """
    wide = _widen(cov, n_iter)
    scale = _norm(wide, "frobenius")
    first = wide / scale
    if coefficients := _coefficients(n_iter, quartic):
        *iterates, root = _quartic_iterates(first, coefficients)
    else:
        iterates, root = [first], _newton_schulz_root(first, n_iter)
    return (root / scale.sqrt()).to(cov.dtype), [scale, *iterates]


def isqrt_backward(grad: Tensor, root: Tensor, saved: list[Tensor], n_iter: int, quartic: bool = False) -> Tensor:
    """Gradient with respect to cov, symmetric, of what `isqrt_with_iterates` gave: `root` (B, F, F) and `saved`.

    Of the quartic it costs 3 products; of up to 6 steps 7 (n_iter - 1) - 2, beyond, where rounding errors would grow,
    9 (n_iter - 1) - 2.
    """
    scale, first, *iterates = saved
    grad = grad.to(scale.dtype)
    scaled = grad / scale.sqrt()
    if coefficients := _coefficients(n_iter, quartic):
        grad_first = _quartic_backward(scaled, first, iterates, coefficients)
    else:
        backward = _symmetric_backward if n_iter <= FEW_STEPS else _chain_rule_backward
        grad_first = backward(scaled, first, _coupled_pairs(first, n_iter)[::-1])
    through_scale = (grad_first * first).addcmul(grad, root.to(grad.dtype), value=0.5).sum((1, 2), keepdim=True)
    return (torch.addcmul(grad_first, first, through_scale, value=-1) / scale).to(root.dtype)


def _coefficients(n_iter: int, quartic: bool) -> Quartic | None:
    """Of the polynomial that is computed in place of the steps; None: the steps."""
    return QUARTICS.get(n_iter) if quartic else None


def _quartic_iterates(a: Tensor, coefficients: Quartic) -> list[Tensor]:
    """A, A^2, U = c2 I + c3 A + c4 A^2 and the polynomial c0 I + c1 A + A^2 U; (B, F, F)."""
    c0, c1, c2, c3, c4 = coefficients
    square = rows_times(a, a, symmetric=True)
    upper = _plus_eye(torch.add(c3 * a, square, alpha=c4), c2)
    return [a, square, upper, _plus_eye(rows_times_plus(square, upper, a, beta=c1, symmetric=True), c0)]


def _quartic_backward(grad: Tensor, a: Tensor, iterates: list[Tensor], coefficients: Quartic) -> Tensor:
    """Gradient of the polynomial with respect to A, all of them polynomials of A and thus symmetric.

    With G the symmetric cotangent, P = G A^2 and the cotangent H = (G U + c4 P) of A^2, it is the symmetric part of
    c1 G + c3 P + 2 H A, H being made symmetric first.
    """
    square, upper = iterates
    _, c1, _, c3, c4 = coefficients
    grad = _symmetric(grad)
    product = rows_times(grad, square, symmetric=True)
    grad_square = _symmetric(rows_times_plus(grad, upper, product, beta=c4, symmetric=True))
    grad = (c1 * grad).add_(product, alpha=c3)
    return _symmetric(rows_times_plus(grad_square, a, grad, alpha=2, symmetric=True))


def _symmetric_backward(grad: Tensor, first: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradient of the last Z with respect to the first Y; `pairs`: (Y, Z) of every step, the last first.

    All iterates are polynomials of one symmetric matrix: they commute, and of cotangents the symmetric part counts.
    With G_z and G_y the symmetric cotangents of Z' and Y' behind a step, P = G_z Z, Q = Y G_y and G_t = P + Q, the
    ones before it are the symmetric parts of (3 G_z - (P + G_t) Y) / 2 and (3 G_y - Z (Q + G_t)) / 2.
    """
    grad_z, grad_y = _symmetric(grad), None
    for y, z in pairs:
        p = rows_times(grad_z, z, symmetric=True)
        if grad_y is None:
            grad_y = _symmetric(rows_times(z, p)).mul_(-0.5)
            grad_z = _symmetric(rows_times_plus(p, y, grad_z, beta=1.5, alpha=-1, symmetric=True))
        else:
            q = rows_times(y, grad_y, symmetric=True)
            grad_t = p + q
            grad_y = _symmetric(rows_times_plus(z, q + grad_t, grad_y, beta=1.5, alpha=-0.5))
            grad_z = _symmetric(rows_times_plus(p + grad_t, y, grad_z, beta=1.5, alpha=-0.5, symmetric=True))
    if grad_y is None:
        return -0.5 * grad_z
    return _symmetric(rows_times_plus(grad_y, first, grad_y, beta=1.5, alpha=-1, symmetric=True)).sub(grad_z, alpha=0.5)


def _chain_rule_backward(grad: Tensor, first: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The same without use of symmetry: what autograd does, stable for any number of steps."""
    eye = _eye_like(first)
    grad_z, grad_y = grad, torch.zeros_like(grad)
    for y, z in pairs:
        t = 1.5 * eye - 0.5 * z @ y
        grad_t = grad_z @ z.mT + y.mT @ grad_y
        grad_y = grad_y @ t.mT - 0.5 * z.mT @ grad_t
        grad_z = t.mT @ grad_z - 0.5 * grad_t @ y.mT
    t = 1.5 * eye - 0.5 * first
    return _symmetric(grad_y @ t - 0.5 * (grad_z + first @ grad_y))


def _newton_schulz_root(a: Tensor, n_iter: int) -> Tensor:
    """Z_n of A (B, F, F) of norm 1."""
    pairs = _coupled_pairs(a, n_iter)
    return rows_times(_factor(*pairs[-1]), pairs[-1][1], symmetric=True) if pairs else _first_factor(a)


def _coupled_pairs(a: Tensor, n_iter: int) -> list[tuple[Tensor, Tensor]]:
    """(Y_i, Z_i) of every step i = 1 ... n_iter - 1 from Y_0 = A of norm 1; 3 (n_iter - 1) - 2 products."""
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
    """T of Y = A and Z = I."""
    return (1.5 * _eye_like(a)).sub(a, alpha=0.5)


def _factor(y: Tensor, z: Tensor) -> Tensor:
    """T = (3 I - Z Y) / 2."""
    return rows_times_plus(z, y, _eye_like(y).expand_as(y), beta=1.5, alpha=-0.5, symmetric=True)


def _plus_eye(matrices: Tensor, scale: float) -> Tensor:
    """A new tensor: what a product gave is not written to, as selective checkpointing may keep it."""
    return torch.add(matrices, _eye_like(matrices), alpha=scale)


def _symmetric(matrices: Tensor) -> Tensor:
    return torch.lerp(matrices, matrices.mT, 0.5)


def isqrt_newton_schulz_uncoupled(cov: Tensor, n_iter: int = 5, norm: Norm = "frobenius") -> Tensor:
    """The vanilla iteration Z <- (3 Z - Z^3 A) / 2 with A = cov / ||cov||, which paper figure 7 compares.

    Unstable: rounding errors grow from about 10 steps in float32 and 15 in float64. Use it for comparison only.
    Arguments, result and errors as in `isqrt_newton_schulz`; 3 products a step, none in the first.
    """
    _check_square(cov)
    _check_n_iter(n_iter)
    with full_precision(cov):
        cov = promote(cov)
        scale = _norm(cov, norm)
        a = cov / scale
        z = 1.5 * _eye_like(a) - 0.5 * a
        for _ in range(n_iter - 1):
            z = 1.5 * z - 0.5 * (z @ z @ z @ a)
        return z / scale.sqrt()


def isqrt_eigh(cov: Tensor) -> Tensor:
    """Exact inverse square root of symmetric positive definite matrices (..., F, F) by eigendecomposition: the oracle.

    Returns float32 or better; not finite where a matrix is singular. Its gradient is undefined for repeated
    eigenvalues.
    """
    _check_square(cov)
    with full_precision(cov):
        values, vectors = torch.linalg.eigh(promote(cov))
        return (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the tensor's device; entering one where there is none to leave takes time."""
    device = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _norm(matrices: Tensor, norm: Norm) -> Tensor:
    if norm == "frobenius":
        return torch.linalg.matrix_norm(matrices, keepdim=True)
    if norm == "trace":
        return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    raise ValueError(f"norm={norm!r}: choose 'frobenius' or 'trace'")


def _widen(cov: Tensor, n_iter: int) -> Tensor:
    """In float64 for more steps than FEW_STEPS, where the device has it: in TF32 these can diverge."""
    return cov if n_iter <= FEW_STEPS else cov.to(widest(cov.device))


def _eye_like(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def promote(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no such numbers."""
    return torch.float32 if device.type in WITHOUT_DOUBLE else torch.float64


def to_double(tensor: Tensor) -> Tensor:
    """In float64, on the processor where the tensor's device has no such numbers."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_DOUBLE else tensor).double()


def _check_square(matrices: Tensor) -> None:
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"matrices of shape {tuple(matrices.shape)}: the last two dimensions must be equal")


def _check_n_iter(n_iter: int) -> None:
    if isinstance(n_iter, bool) or not isinstance(n_iter, int) or n_iter < 1:
        raise ValueError(
            f"n_iter={n_iter!r}: at least one Newton-Schulz step is needed; the paper uses 5, or 15 for the first layer"
        )
