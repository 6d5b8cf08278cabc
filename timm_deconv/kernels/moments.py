"""Mean and covariance of the sampled rows of a batch, and the gradient through them.

Rows are gathered again in the backward pass, so that nothing of the size of an unfolded input is kept, and their
gradient lands in place in that of the input.
"""

import torch
from torch import Tensor

from timm_deconv.linalg import covariance, full_precision, symmetric_part

from .blocks import Blocks, merge_rows, split_rows
from .onednn import inner_products, rows_times
from .operation import Operation
from .windows import Sampling, gather, scatter_add_

__all__ = ["add_moments_gradient_", "sampled_moments"]


def _sampled_moments(x: Tensor, sampling: Sampling, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Compute mean (S, F) and covariance (S, F, F), divided by the rows R, of sampled windows of x (N, C, H, W).

    Args:
        x: any floating dtype; the moments are in float32 or better, whatever the autocast mode.
        sampling: which windows.
        blocks: which features of a window are a row.
    """
    with full_precision(x):
        rows, _ = _sampled_rows(x, sampling, blocks)
        mean = rows.mean(1, keepdim=True)
        deviations = _subtract(rows, mean, sampling)
        return mean.squeeze(1), inner_products(deviations, deviations) / rows.shape[1]


def _add_moments_gradient_(
    grad_x: Tensor,
    x: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_cov: Tensor,
    sampling: Sampling,
    blocks: Blocks,
) -> None:
    """Add to the gradient of x, in place, what reaches it through `sampled_moments`.

    Args:
        grad_x, x: (N, C, H, W).
        mean: (S, F), that `sampled_moments` gave.
        grad_mean: (S, F). grad_cov: (S, F, F), symmetric.
        sampling, blocks: those of the forward pass.
    """
    with full_precision(x):
        rows, shape = _sampled_rows(x, sampling, blocks)
        samples = rows.shape[1]
        deviations = _subtract(rows, mean.unsqueeze(1), sampling)
        grad_rows = _times_symmetric(deviations, 2 / samples * grad_cov, grad_mean.unsqueeze(1) / samples)
        scatter_add_(grad_x, merge_rows(grad_rows, shape, blocks).to(grad_x.dtype), sampling)


def plain_moments(x: Tensor, sampling: Sampling, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Do what `sampled_moments` does, of x (N, C, H, W), by operations that can be derived twice."""
    return covariance(_sampled_rows(x, sampling, blocks)[0])


def _sampled_rows(x: Tensor, sampling: Sampling, blocks: Blocks) -> tuple[Tensor, list[int]]:
    """Return rows (S, R, F) in float32 or better, and the shape of the columns that they are made of."""
    columns = gather(x, sampling, samples_last=blocks.groups > 1)
    rows = split_rows(columns, blocks)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)), list(columns.shape)


def _subtract(rows: Tensor, mean: Tensor, sampling: Sampling) -> Tensor:
    """Centre rows, in place where they are copies for certain: fresh memory can cost more than the arithmetic."""
    return rows - mean if sampling.window.pointwise else rows.sub_(mean)


def _times_symmetric(rows: Tensor, matrices: Tensor, constant: Tensor) -> Tensor:
    """Compute rows M + constant of rows (S, R, F), symmetric M (S, F, F) and constant (S, 1, F) in the rows' layout."""
    if rows.is_contiguous() or rows.shape[-1] == 1:
        return rows_times(rows, matrices, constant, symmetric=True)
    return torch.baddbmm(constant.mT, matrices, rows.mT).mT


def _fake_moments(x: Tensor, sampling: Sampling, blocks: Blocks) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty(blocks.sets, blocks.features, dtype=dtype)
    return mean, x.new_empty(blocks.sets, blocks.features, blocks.features, dtype=dtype)


def _backward(
    grads: tuple[Tensor, Tensor], kept: list[Tensor], x: Tensor, sampling: Sampling, blocks: Blocks
) -> tuple[Tensor]:
    grad_mean, grad_cov = grads
    (mean,) = kept
    grad_x = torch.zeros_like(x)
    add_moments_gradient_(grad_x, x, mean, grad_mean, symmetric_part(grad_cov), sampling, blocks)
    return (grad_x,)


sampled_moments = Operation(_sampled_moments, "(Tensor x, SymInt[] sampling, SymInt[] blocks) -> (Tensor, Tensor)")
sampled_moments.register_fake(_fake_moments)
sampled_moments.register_autograd(_backward, plain_moments, keep=lambda mean, cov: [mean])

add_moments_gradient_ = Operation(
    _add_moments_gradient_,
    "(Tensor(a!) grad_x, Tensor x, Tensor mean, Tensor grad_mean, Tensor grad_cov,"
    " SymInt[] sampling, SymInt[] blocks) -> ()",
    mutates_args=("grad_x",),
)
