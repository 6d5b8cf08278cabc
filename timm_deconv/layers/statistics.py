"""Mean and whitener of a batch, and the way back to it by hand.

Rows are gathered again in the backward pass, so that nothing of the size of an unfolded input is kept, and their
gradient lands in place in that of the input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from timm_deconv.linalg import (
    covariance,
    full_precision,
    isqrt_backward,
    isqrt_of_rows,
    isqrt_with_iterates,
    promote,
)
from timm_deconv.products import rows_times

from .config import DeconvCfg
from .conv_map import ConvMap
from .partition import split_rows, unsplit_rows
from .whitening import count_padding, count_padding_backward, regularise, regularise_backward, whitener

__all__ = ["Statistics", "add_statistics_gradient_", "batch_statistics", "vector_statistics"]


class Statistics(NamedTuple):
    """Mean (S, F) and whitener (S, F, F), and what the way back through the whitener needs."""

    mean: Tensor
    whitener: Tensor
    iterates: list[Tensor]


@torch.no_grad()
def batch_statistics(x: Tensor, conv_map: ConvMap) -> Statistics:
    """Statistics of the windows that a convolution sees in x, without gradient; see `add_statistics_gradient_`."""
    with full_precision(x):
        rows, _ = _rows(x, conv_map)
        mean, cov = covariance(rows, overwrite=conv_map.copies)
        mean, cov = count_padding(mean, cov, conv_map.padding_share(x))
        cfg = conv_map.cfg
        cov = regularise(cov, rows.shape[-2], cfg)
        return Statistics(mean, *isqrt_with_iterates(cov, cfg.n_iter, cfg.quartic))


def vector_statistics(rows: Tensor, cfg: DeconvCfg) -> Statistics:
    """Statistics of rows (S, R, F) that are all the samples there are; differentiable by autograd.

    Of at most half as many rows as features no covariance is made, unless it were to be shrunk.
    """
    rows, (samples, features) = promote(rows), rows.shape[-2:]
    if 2 * samples > features or samples < cfg.min_rows * features:
        mean, cov = covariance(rows)
        return Statistics(mean, whitener(cov, samples, cfg), [])
    mean = rows.mean(-2, keepdim=True)
    deviations = (rows - mean) / samples**0.5
    return Statistics(mean.squeeze(-2), isqrt_of_rows(deviations, cfg.eps, cfg.n_iter, cfg.quartic), [])


def add_statistics_gradient_(
    grad_x: Tensor,
    x: Tensor,
    conv_map: ConvMap,
    statistics: Statistics,
    grad_mean: Tensor,
    grad_whitener: Tensor,
) -> None:
    """Add to the gradient of x what reaches it through the mean, (S, 1, F), and the whitener."""
    rows, shape = _rows(x, conv_map)
    samples = rows.shape[-2]
    cfg = conv_map.cfg
    grad_cov = isqrt_backward(grad_whitener, statistics.whitener, statistics.iterates, cfg.n_iter, cfg.quartic)
    grad_cov = regularise_backward(grad_cov, samples, cfg)
    mean = statistics.mean.unsqueeze(-2)
    mean, grad_mean, grad_cov = count_padding_backward(mean, grad_mean, grad_cov, conv_map.padding_share(x))
    rows = rows.sub_(mean) if conv_map.copies else rows - mean
    grad_rows = _times_symmetric(rows, grad_cov, grad_mean / samples, 2 / samples)
    conv_map.add_columns_(grad_x, unsplit_rows(grad_rows, shape, conv_map.partition).to(grad_x.dtype))


def _rows(x: Tensor, conv_map: ConvMap) -> tuple[Tensor, list[int]]:
    """Rows (S, R, F) in float32 or better, and the shape of the columns that they are made of."""
    columns = conv_map.columns(x)
    return promote(split_rows(columns, conv_map.partition)), list(columns.shape)


def _times_symmetric(rows: Tensor, matrices: Tensor, constant: Tensor, scale: float) -> Tensor:
    """scale rows M + constant of rows (S, R, F), symmetric M (S, F, F) and constant (S, 1, F), in the rows' layout."""
    if rows.is_contiguous() or rows.shape[-1] == 1:
        return rows_times(rows, scale * matrices, constant, symmetric=True)
    return torch.baddbmm(constant.mT, matrices, rows.mT, alpha=scale).mT
