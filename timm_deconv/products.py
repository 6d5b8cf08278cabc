"""Products of many rows and a few small matrices, where it is faster as 1x1 convolutions.

A row is a pixel, its features are the channels. On CPUs these are the products of oneDNN instead of those of the BLAS:
an AMD EPYC was seen to take half the time for them, in the same float32. What is not float32 on a CPU, or too little to
matter, stays a matrix product.
"""

import torch
from torch import Tensor

__all__ = ["POINTWISE", "as_images", "as_kernel", "few_products", "inner_products", "rows_times", "rows_times_plus"]

IMAGES = 16
"""Images into which the rows are divided, where they can be: a processor was seen to take half the time that it takes
for one image, and a quarter of that for as many images as there are rows."""

FEW_PRODUCTS = 2**23
"""Multiplications up to which a convolution takes longer to begin than it saves."""

HAS_ONEDNN = torch.backends.mkldnn.is_available()
"""Asked here, as what is compiled may not ask."""

POINTWISE = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
"""The geometry of a 1x1 convolution, as its backward pass wants it."""


def rows_times(rows: Tensor, matrices: Tensor, constant: Tensor | None = None, *, symmetric: bool = False) -> Tensor:
    """rows (S, R, F) times matrices (S, F, G), plus a constant (S, 1, G): (S, R, G). Differentiable; R F G products.

    Args:
        symmetric: the matrices are; then their rows serve as their columns where no gradients flow, which saves up to
            a quarter of the time.
    """
    if _of_numbers(rows, matrices.shape[-1]):
        return rows * matrices if constant is None else torch.addcmul(constant, rows, matrices)
    if not _by_convolution(rows, matrices.shape[-1]):
        return torch.bmm(rows, matrices) if constant is None else torch.baddbmm(constant, rows, matrices)
    # torch 2.11 fails to compile a convolution whose bias is computed.
    bias = None if constant is None or torch.compiler.is_compiling() else constant.reshape(-1)
    kernel = as_kernel(matrices.mT if symmetric and not _needs_grad(rows, matrices) else matrices)
    product = torch.conv2d(as_images(rows), kernel, bias)
    product = product.permute(0, 2, 3, 1).reshape(1, rows.shape[1], -1)
    return product if constant is None or bias is not None else product + constant


def rows_times_plus(
    rows: Tensor, matrices: Tensor, summand: Tensor, *, beta: float = 1.0, alpha: float = 1.0, symmetric: bool = False
) -> Tensor:
    """beta summand + alpha rows matrices, as `rows_times`: (S, R, G). Differentiable."""
    if not _by_convolution(rows, matrices.shape[-1]):
        return torch.baddbmm(summand, rows, matrices, beta=beta, alpha=alpha)
    product = rows_times(rows, matrices, symmetric=symmetric)  # not written to: selective checkpointing may keep it
    return torch.add(summand if beta == 1 else beta * summand, product, alpha=alpha)


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of rows (S, R, F) and (S, R, G): (S, F, G). Differentiable; R F G products."""
    if _of_numbers(a, b.shape[-1]):
        return (a * b).sum(1, keepdim=True)
    if _needs_grad(a, b) or not (_by_convolution(a, b.shape[-1]) and b.is_contiguous()):
        return torch.bmm(a.mT, b)
    kernel = a.new_empty(()).expand(a.shape[-1], b.shape[-1], 1, 1)
    only_kernel = [False, True, False]
    _, products, _ = torch.ops.aten.convolution_backward(
        as_images(a), as_images(b), kernel, [0], *POINTWISE, only_kernel
    )
    return products.view(1, a.shape[-1], b.shape[-1])


def few_products(values: Tensor, outputs: int) -> bool:
    """Whether products of all values with so many columns are too few for a convolution to be faster."""
    return values.numel() * outputs <= FEW_PRODUCTS


def as_kernel(matrix: Tensor) -> Tensor:
    """A matrix (1, F, G) as the weight (G, F, 1, 1) of the convolution that multiplies by it, a view."""
    return matrix.permute(2, 1, 0).unsqueeze(-1)


def as_images(rows: Tensor) -> Tensor:
    """Contiguous rows (1, R, F) as the pixels of images (N, F, 1, R / N), a view in channels_last."""
    _, count, features = rows.shape
    images = IMAGES if count % IMAGES == 0 else 1
    return rows.view(images, 1, count // images, features).permute(0, 3, 1, 2)


def _needs_grad(a: Tensor, b: Tensor) -> bool:
    return torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)


def _of_numbers(rows: Tensor, outputs: int) -> bool:
    """Whether matrices are single numbers, of which a product of matrices makes a loop over small ones."""
    return rows.shape[-1] == outputs == 1


def _by_convolution(rows: Tensor, outputs: int) -> bool:
    return (
        rows.shape[0] == 1
        and rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and rows.is_contiguous()
        and not few_products(rows, outputs)
        and HAS_ONEDNN
    )
