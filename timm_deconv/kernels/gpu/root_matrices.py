"""Kernels of the inverse root of sets of one feature, and of up to 64: a program has a whole matrix."""

import triton
import triton.language as tl

__all__ = ["derive_matrix", "derive_numbers", "whiten_matrix", "whiten_numbers"]

WHOLE, PART = tl.constexpr(32), tl.constexpr(16)
"""Largest factor that registers hold, and the columns of a larger one that they hold at a time."""

WAITING = tl.constexpr(5)
"""Matrices of the scratch before the iterates that wait for the way back."""


@triton.jit
def whiten_numbers(
    mean, cov, whitened_mean, whitener, varies, norm, first, square, upper, scratch, steps, sets, padding, share, eps,
    least, ZEROES: tl.constexpr, COEFFICIENTS: tl.constexpr, NUMBERS: tl.constexpr,
):
    """Whiten sets of one feature; their covariance is its own shrunk one."""
    index = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    there = index < sets
    at = tl.load(mean + index, there, other=0)
    variance = (1 - padding) * (tl.load(cov + index, there, other=1) + padding * at * at)
    a, kept = _normed(variance + eps, tl.abs(variance + eps), variance, least, ZEROES)
    if COEFFICIENTS is None:
        root = 1.5 - 0.5 * a
        y = a * root
        for _ in range(steps - 1):
            t = 1.5 - 0.5 * root * y
            y *= t
            root *= t
    else:
        of_square = a * a
        of_upper = COEFFICIENTS[2] + COEFFICIENTS[3] * a + COEFFICIENTS[4] * of_square
        root = COEFFICIENTS[0] + COEFFICIENTS[1] * a + of_square * of_upper
        tl.store(square + index, of_square, there)
        tl.store(upper + index, of_upper, there)
    tl.store(first + index, a, there)
    tl.store(norm + index, kept, there)
    tl.store(varies + index, variance > least, there)
    tl.store(whitener + index, root * tl.rsqrt(kept), there)
    tl.store(whitened_mean + index, (1 - padding) * at, there)


@triton.jit
def derive_numbers(
    grad_mean, grad, mean, whitener, norm, first, square, upper, own_mean, grad_own_mean, grad_cov, scratch,
    sets, padding, NUMBERS: tl.constexpr,
):
    """Derive `whiten_numbers`: A is 1 whatever the variance, which reaches the whitener through the norm alone."""
    index = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    there = index < sets
    at = tl.load(mean + index, there, other=0)
    of_mean = tl.load(grad_mean + index, there, other=0)
    of_cov = tl.load(grad + index, there, other=0) * tl.load(whitener + index, there, other=0)
    of_cov *= -0.5 / tl.load(norm + index, there, other=1)
    tl.store(own_mean + index, at / (1 - padding), there)
    tl.store(grad_own_mean + index, (1 - padding) * of_mean + 2 * padding * at * of_cov, there)
    tl.store(grad_cov + index, (1 - padding) * of_cov, there)


@triton.jit
def whiten_matrix(
    mean, cov, whitened_mean, whitener, varies, norm, first, square, upper, scratch, steps, features, padding, share,
    eps, least, ZEROES: tl.constexpr, COEFFICIENTS: tl.constexpr, EXTENT: tl.constexpr,
):
    """Whiten a set: padding, shrinking, eps, norm, and the quartic or the steps.

    scratch: (S, 4, EXTENT, EXTENT).
    """
    matrix = tl.program_id(0).to(tl.int64)
    scratch += matrix * 4 * EXTENT * EXTENT
    index, eye = tl.arange(0, EXTENT), _eye(EXTENT)
    real, vector, corner = index < features, matrix * features + index, matrix * features * features
    there, place = real[:, None] & real[None, :], index[:, None] * features + index[None, :]
    at = tl.load(mean + vector, real, other=0)
    a = (1 - padding) * (tl.load(cov + corner + place, there, other=0) + padding * at[:, None] * at[None, :])
    variance = tl.sum(tl.where(eye > 0, a, 0)) / features
    a = (1 - share) * a + tl.where(there, (share * variance + eps) * eye, 0)
    a, kept = _normed(a, tl.sqrt(tl.sum(a * a)), variance, least, ZEROES)
    tl.store(first + corner + place, a, there)
    tl.store(norm + matrix, kept)
    tl.store(varies + matrix, variance > least)
    tl.store(whitened_mean + vector, (1 - padding) * at, real)
    if COEFFICIENTS is None:
        root = _steps(a, scratch, steps, EXTENT)
    else:
        _put(scratch, 0, a, EXTENT)
        of_square = _product(scratch, 0, 0, EXTENT)
        _put(scratch, 1, of_square, EXTENT)
        tl.store(square + corner + place, of_square, there)
        of_upper = COEFFICIENTS[2] * eye + COEFFICIENTS[3] * a + COEFFICIENTS[4] * of_square
        _put(scratch, 2, of_upper, EXTENT)
        tl.store(upper + corner + place, of_upper, there)
        root = _product(scratch, 1, 2, EXTENT) + COEFFICIENTS[0] * eye + COEFFICIENTS[1] * _get(scratch, 0, EXTENT)
    tl.store(whitener + corner + place, root * tl.rsqrt(kept), there)


@triton.jit
def derive_matrix(
    grad_mean, grad, mean, whitener, norm, first, square, upper, own_mean, grad_own_mean, grad_cov, scratch, steps,
    features, padding, share, COEFFICIENTS: tl.constexpr, EXTENT: tl.constexpr,
):
    """Derive `whiten_matrix`.

    scratch: (S, WAITING + 2 (steps - 1), EXTENT, EXTENT); for the quartic steps is 1.
    """
    matrix = tl.program_id(0).to(tl.int64)
    scratch += matrix * (WAITING + 2 * steps - 2) * EXTENT * EXTENT
    index = tl.arange(0, EXTENT)
    real, vector, corner = index < features, matrix * features + index, matrix * features * features
    there, place = real[:, None] & real[None, :], index[:, None] * features + index[None, :]
    scaled = tl.rsqrt(tl.load(norm + matrix))
    g = _symmetric(tl.load(grad + corner + place, there, other=0))
    through_norm = 0.5 * tl.sum(g * tl.load(whitener + corner + place, there, other=0))
    _put(scratch, 0, tl.load(first + corner + place, there, other=0), EXTENT)
    _put(scratch, 1, scaled * g, EXTENT)
    if COEFFICIENTS is None:
        g = _derive_steps(scaled * g, scratch, steps, EXTENT)
    else:
        of_square = tl.load(square + corner + place, there, other=0)
        _put(scratch, 2, of_square, EXTENT)
        to_square = COEFFICIENTS[4] * of_square + tl.load(upper + corner + place, there, other=0)
        _put(scratch, 3, to_square, EXTENT)
        to_square = _symmetric(_product(scratch, 1, 3, EXTENT))
        _put(scratch, 3, to_square, EXTENT)
        g = COEFFICIENTS[3] * _product(scratch, 1, 2, EXTENT)
        g += 2 * _product(scratch, 3, 0, EXTENT)
        g = _symmetric(g + COEFFICIENTS[1] * _get(scratch, 1, EXTENT))
    a, eye = tl.load(first + corner + place, there, other=0), _eye(EXTENT)
    through_norm += tl.sum(g * a)
    g = scaled * scaled * (g - through_norm * a)
    g = (1 - share) * g + share * tl.sum(g * eye) / features * eye
    at, of_mean = tl.load(mean + vector, real, other=0), tl.load(grad_mean + vector, real, other=0)
    of_mean = (1 - padding) * of_mean + 2 * padding * tl.sum(at[:, None] * g, 0)
    tl.store(own_mean + vector, at / (1 - padding), real)
    tl.store(grad_own_mean + vector, of_mean, real)
    tl.store(grad_cov + corner + place, (1 - padding) * g, there)


@triton.jit
def _steps(a, scratch, steps, EXTENT: tl.constexpr):
    """Return Z after all steps from Y = A."""
    eye = _eye(EXTENT)
    z = 1.5 * eye - 0.5 * a
    if steps > 1:
        _put(scratch, 0, a, EXTENT)
        _put(scratch, 1, z, EXTENT)
        _put(scratch, 2, _product(scratch, 0, 1, EXTENT), EXTENT)
        for step in range(steps - 1):
            _put(scratch, 3, 1.5 * eye - 0.5 * _product(scratch, 1, 2, EXTENT), EXTENT)
            z = _product(scratch, 3, 1, EXTENT)
            if step < steps - 2:
                y = _product(scratch, 2, 3, EXTENT)
                _put(scratch, 1, z, EXTENT)
                _put(scratch, 2, y, EXTENT)
    return z


@triton.jit
def _derive_steps(g, scratch, steps, EXTENT: tl.constexpr):
    """Return the cotangent of A from that of the last Z, as `_symmetric_backward` of the plain form does.

    A and that cotangent are the first matrices of the scratch. Y and Z of every step are computed again, and wait.
    """
    g *= -0.5
    if steps > 1:
        eye, last = _eye(EXTENT), WAITING + 2 * steps - 4
        tl.debug_barrier()
        _put(scratch, WAITING + 1, 1.5 * eye - 0.5 * _get(scratch, 0, EXTENT), EXTENT)
        _put(scratch, WAITING, _product(scratch, 0, WAITING + 1, EXTENT), EXTENT)
        for step in range(steps - 2):
            y = WAITING + 2 * step
            _put(scratch, 2, 1.5 * eye - 0.5 * _product(scratch, y + 1, y, EXTENT), EXTENT)
            _put(scratch, y + 2, _product(scratch, y, 2, EXTENT), EXTENT)
            _put(scratch, y + 3, _product(scratch, 2, y + 1, EXTENT), EXTENT)
        _put(scratch, 3, _product(scratch, 1, last + 1, EXTENT), EXTENT)
        _put(scratch, 2, -0.5 * _symmetric(_product(scratch, last + 1, 3, EXTENT)), EXTENT)
        to_z = 1.5 * _get(scratch, 1, EXTENT) - _product(scratch, 3, last, EXTENT)
        _put(scratch, 1, _symmetric(to_z), EXTENT)
        for step in range(steps - 2):
            y = last - 2 - 2 * step
            p, q = _product(scratch, 1, y + 1, EXTENT), _product(scratch, y, 2, EXTENT)
            _put(scratch, 3, p + 2 * q, EXTENT)
            _put(scratch, 4, 2 * p + q, EXTENT)
            to_y = 1.5 * _get(scratch, 2, EXTENT) - 0.5 * _product(scratch, y + 1, 3, EXTENT)
            _put(scratch, 2, _symmetric(to_y), EXTENT)
            to_z = 1.5 * _get(scratch, 1, EXTENT) - 0.5 * _product(scratch, 4, y, EXTENT)
            _put(scratch, 1, _symmetric(to_z), EXTENT)
        g = _symmetric(1.5 * _get(scratch, 2, EXTENT) - _product(scratch, 2, 0, EXTENT))
        g -= 0.5 * _get(scratch, 1, EXTENT)
    return g


@triton.jit
def _product(scratch, left, right, EXTENT: tl.constexpr):
    """Multiply two matrices of the scratch, of which all is read then; registers do not hold whole factors."""
    tl.debug_barrier()  # a thread reads what others have put there
    DEPTH: tl.constexpr = EXTENT if EXTENT <= WHOLE else PART
    index = tl.arange(0, EXTENT)
    product = tl.zeros((EXTENT, EXTENT), tl.float32)
    for k in range(0, EXTENT, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        columns = tl.load(scratch + (left * EXTENT + index[:, None]) * EXTENT + depth[None, :])
        rows = tl.load(scratch + (right * EXTENT + depth[:, None]) * EXTENT + index[None, :])
        product = tl.dot(columns, rows, product, input_precision="tf32x3")
    tl.debug_barrier()
    return product


@triton.jit
def _put(scratch, place, matrix, EXTENT: tl.constexpr):
    """Write a matrix into the scratch, where `_product` finds it, and `_get` once there has been a barrier."""
    tl.store(scratch + place * EXTENT * EXTENT + _places(EXTENT), matrix)


@triton.jit
def _get(scratch, place, EXTENT: tl.constexpr):
    return tl.load(scratch + place * EXTENT * EXTENT + _places(EXTENT))


@triton.jit
def _normed(matrix, scale, variance, least, ZEROES: tl.constexpr):
    """Return a matrix over its norm, and the norm as it is kept: infinite where the whitener is to be zero."""
    kept = scale
    if ZEROES:
        kept = tl.where(variance <= least, float("inf"), scale)
    return matrix / scale, kept


@triton.jit
def _eye(EXTENT: tl.constexpr):
    index = tl.arange(0, EXTENT)
    return tl.where(index[:, None] == index[None, :], 1.0, 0.0)


@triton.jit
def _places(EXTENT: tl.constexpr):
    index = tl.arange(0, EXTENT)
    return index[:, None] * EXTENT + index[None, :]


@triton.jit
def _symmetric(matrix):
    return 0.5 * (matrix + tl.trans(matrix))
