"""Products of many rows with a few small matrices, as 1x1 convolutions where that is faster on a CPU.

A row becomes a pixel, its features the channels. Then oneDNN multiplies instead of the BLAS: an AMD EPYC was seen to
take half the time for it, in the same float32. What is not float32 on a processor, or too little to matter, stays a
matrix product. Nothing here is differentiable: it is used behind the seam, where adjoints are written by hand.
"""

import torch
from torch import Tensor

from .operation import wants_plain_form

__all__ = ["POINTWISE", "as_images", "as_kernel", "few_products", "inner_products", "rows_times", "rows_times_plus"]

IMAGES = 16
"""Images into which the rows are divided, where they can be: a processor was seen to take half the time that it takes
for one image, and a quarter of that for as many images as there are rows."""

FEW_PRODUCTS = 2**23
"""Multiplications up to which a convolution takes longer to begin than it saves."""

POINTWISE = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
"""Geometry of a 1x1 convolution, as torch's convolution_backward takes it."""


def rows_times(rows: Tensor, matrices: Tensor, constant: Tensor | None = None, *, symmetric: bool = False) -> Tensor:
    """Multiply rows (S, R, F) by matrices (S, F, G) and add a constant (S, 1, G): (S, R, G). R F G products.

    Args:
        rows, matrices, constant: of one dtype.
        symmetric: say that the matrices are; then their rows serve as their columns, which saves up to a quarter of
            the time.
    """
    if _are_numbers(rows, matrices.shape[-1]):
        return rows * matrices if constant is None else torch.addcmul(constant, rows, matrices)
    if not _by_convolution(rows, matrices.shape[-1]):
        return torch.bmm(rows, matrices) if constant is None else torch.baddbmm(constant, rows, matrices)
    kernel = as_kernel(matrices.mT if symmetric else matrices)
    product = torch.conv2d(as_images(rows), kernel, None if constant is None else constant.reshape(-1))
    return product.permute(0, 2, 3, 1).reshape(1, rows.shape[1], -1)


def rows_times_plus(
    rows: Tensor, matrices: Tensor, summand: Tensor, *, beta: float = 1.0, alpha: float = 1.0, symmetric: bool = False
) -> Tensor:
    """Compute beta summand + alpha rows matrices: (S, R, G).

    Args:
        rows: (S, R, F). matrices: (S, F, G). summand: (S, R, G); all of one dtype.
        beta, alpha: weights of the summand and of the product.
        symmetric: see `rows_times`.
    """
    if not _by_convolution(rows, matrices.shape[-1]):
        return torch.baddbmm(summand, rows, matrices, beta=beta, alpha=alpha)
    product = rows_times(rows, matrices, symmetric=symmetric)  # not written to: selective checkpointing may keep it
    return torch.add(summand if beta == 1 else beta * summand, product, alpha=alpha)


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply the transpose of rows a (S, R, F) with rows b (S, R, G): (S, F, G). R F G products."""
    if _are_numbers(a, b.shape[-1]):
        return (a * b).sum(1, keepdim=True)
    if not (_by_convolution(a, b.shape[-1]) and b.is_contiguous()):
        return torch.bmm(a.mT, b)
    kernel = a.new_empty(()).expand(a.shape[-1], b.shape[-1], 1, 1)
    only_kernel = [False, True, False]
    _, products, _ = torch.ops.aten.convolution_backward(
        as_images(a), as_images(b), kernel, [0], *POINTWISE, only_kernel
    )
    return products.view(1, a.shape[-1], b.shape[-1])


def few_products(values: Tensor, outputs: int) -> bool:
    """Tell whether products of values (..., F) with (F, `outputs`) are too few for a convolution to be faster."""
    return values.numel() * outputs <= FEW_PRODUCTS


def as_kernel(matrix: Tensor) -> Tensor:
    """View a matrix (1, F, G) as the weight (G, F, 1, 1) of the convolution that multiplies by it."""
    return matrix.permute(2, 1, 0).unsqueeze(-1)


def as_images(rows: Tensor) -> Tensor:
    """View contiguous rows (1, R, F) as the pixels of images (N, F, 1, R / N) in channels_last."""
    _, count, features = rows.shape
    images = IMAGES if count % IMAGES == 0 else 1
    return rows.view(images, 1, count // images, features).permute(0, 3, 1, 2)


def _are_numbers(rows: Tensor, outputs: int) -> bool:
    """Tell whether the matrices are single numbers, of which a matrix product makes a loop over small ones."""
    return rows.shape[-1] == outputs == 1


def _by_convolution(rows: Tensor, outputs: int) -> bool:
    return (
        rows.shape[0] == 1
        and rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and rows.is_contiguous()
        and not few_products(rows, outputs)
        and torch.backends.mkldnn.is_available()
        and not wants_plain_form()
    )
