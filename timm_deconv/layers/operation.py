"""A whitened convolution or linear layer as one differentiable operation.

rows of x -> moments -> inverse root -> fold -> convolution, and the way back by hand. Written as separate operations,
autograd would keep the unfolded input alive until the backward pass, and make a dense, mostly zero gradient of the
whole input for the few sampled windows. Here rows are gathered again in the backward pass, and their gradient lands in
place in the gradient that the convolution returns.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from timm_deconv.linalg import covariance, full_precision, isqrt_backward, isqrt_with_iterates

from .config import DeconvCfg
from .partition import (
    Partition,
    split_rows,
    split_weight,
    spread_shift,
    unsplit_rows,
    unsplit_weight,
)
from .sampling import Window, add_window_columns_, sampling_step, window_columns
from .whitening import fold, regularise, regularise_backward

__all__ = ["ConvMap", "LinearMap", "Map", "whitened_map"]

Gradients = tuple[Tensor | None, Tensor, Tensor]
Running = tuple[Tensor, Tensor, Tensor]


class ConvMap(NamedTuple):
    """A convolution of zero-padded images and the windows that it sees."""

    window: Window
    groups: int
    partition: Partition
    cfg: DeconvCfg

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        window = self.window
        return torch.conv2d(x, weight, bias, window.stride, window.padding, window.dilation, self.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, with_x: bool) -> Gradients:
        """Gradients of x (None unless `with_x`), weight and bias."""
        window, needed = self.window, [with_x, True, True]
        geometry = (window.stride, window.padding, window.dilation, False, [0, 0], self.groups)
        return torch.ops.aten.convolution_backward(grad, x, weight, [weight.shape[0]], *geometry, needed)

    def columns(self, x: Tensor) -> Tensor:
        """Sampled windows, (..., K)."""
        return window_columns(x, self.window, sampling_step(x, self.window, self.partition, self.cfg), self.cfg.grid)

    def add_columns_(self, grad_x: Tensor, grad_columns: Tensor) -> None:
        """Add the gradient of `columns(x)` to that of x."""
        step = sampling_step(grad_x, self.window, self.partition, self.cfg)
        add_window_columns_(grad_x, grad_columns, self.window, step, self.cfg.grid)


class LinearMap(NamedTuple):
    """A linear layer and the feature vectors (R, K) that it sees, each a sample."""

    partition: Partition
    cfg: DeconvCfg

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, with_x: bool) -> Gradients:
        """Gradients of x (None unless `with_x`), weight and bias."""
        return grad @ weight if with_x else None, grad.mT @ x, grad.sum(0)

    def columns(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def add_columns_(self, grad_x: Tensor, grad_columns: Tensor) -> None:
        """Add the gradient of `columns(x)` to that of x."""
        grad_x += grad_columns


Map = ConvMap | LinearMap


def whitened_map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    linear_map: Map,
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The map applied to whitened windows of x, whose statistics are taken from x.

    Args:
        x: (N, C, H, W) images or (R, K) feature vectors.
        weight, bias: of the map; no bias counts as zeros.
        linear_map: what is applied, and how its input is sampled and divided into blocks.
        running: (frozen, mean, whitener): where the boolean scalar `frozen` is true, these are used, without gradient.

    Returns:
        the output, and mean (S, F) and whitener (S, F, F) without gradient. Gradients flow to x (through the statistics
        too), weight and bias; not twice, as the backward pass is written by hand.
    """
    output, mean, whitener = _WhitenedMap.apply(x, weight, bias, linear_map, *(running or (None, None, None)))
    return output, mean, whitener


class _WhitenedMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        linear_map: Map,
        frozen: Tensor | None,
        running_mean: Tensor | None,
        running_whitener: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        partition, cfg = linear_map.partition, linear_map.cfg
        dtype = _map_dtype(x)
        with full_precision(x):
            rows = split_rows(linear_map.columns(x), partition)
            mean, cov = covariance(rows)
            whitener, iterates = isqrt_with_iterates(regularise(cov, rows.shape[-2], cfg), cfg.n_iter)
            if frozen is not None:
                assert running_mean is not None and running_whitener is not None
                mean = torch.where(frozen, running_mean, mean)
                whitener = torch.where(frozen, running_whitener, whitener)
            folded = fold(weight, bias, mean, whitener, partition)
            folded_weight, folded_bias = (value.to(dtype) for value in folded)
            output = linear_map(x.to(dtype), folded_weight, folded_bias)
        ctx.save_for_backward(x, weight, folded_weight, mean, whitener, frozen, *iterates)
        ctx.linear_map, ctx.has_bias = linear_map, bias is not None
        ctx.mark_non_differentiable(mean, whitener)
        return output, mean, whitener

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _whitener: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, folded_weight, mean, whitener, frozen, *iterates = ctx.saved_tensors
        linear_map: Map = ctx.linear_map
        partition = linear_map.partition
        with full_precision(x):
            low = folded_weight.dtype
            grad_x, grad_folded, grad_bias = linear_map.backward(
                grad.to(low), x.to(low), folded_weight, ctx.needs_input_grad[0]
            )
            grad_outputs = spread_shift(grad_bias.to(whitener.dtype), partition)
            # b' = b - w' mu, so what reaches w' is its own gradient less the bias's along mu
            grad_rows = split_weight(grad_folded.to(whitener.dtype), partition)
            grad_rows = torch.baddbmm(grad_rows, grad_outputs.unsqueeze(-1), mean.unsqueeze(-2), alpha=-1)
            grad_weight = unsplit_weight(grad_rows @ whitener, list(weight.shape), partition).to(weight.dtype)
            if grad_x is not None:
                rows = split_weight(weight.to(whitener.dtype), partition)
                grad_mean = -(grad_outputs.unsqueeze(-2) @ rows) @ whitener
                grad_whitener = rows.mT @ grad_rows
                if frozen is not None:
                    grad_mean, grad_whitener = (g.masked_fill(frozen, 0) for g in (grad_mean, grad_whitener))
                grad_x = grad_x.to(x.dtype)
                _add_statistics_gradient_(grad_x, x, linear_map, mean, grad_mean, grad_whitener, iterates)
        return grad_x, grad_weight, grad_bias.to(weight.dtype) if ctx.has_bias else None, None, None, None, None


def _map_dtype(x: Tensor) -> torch.dtype:
    """What the map itself computes in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if not x.is_meta and torch.is_autocast_enabled(device) else x.dtype


def _add_statistics_gradient_(
    grad_x: Tensor,
    x: Tensor,
    linear_map: Map,
    mean: Tensor,
    grad_mean: Tensor,
    grad_whitener: Tensor,
    iterates: list[Tensor],
) -> None:
    """Add to the gradient of x what reaches it through the mean (S, 1, F) and the whitener (S, F, F)."""
    columns = linear_map.columns(x)
    rows = split_rows(columns, linear_map.partition).to(mean.dtype)
    samples = rows.shape[-2]
    grad_cov = isqrt_backward(grad_whitener, iterates)
    grad_cov = regularise_backward(grad_cov, samples, linear_map.cfg)
    grad_rows = torch.baddbmm(grad_mean / samples, rows - mean.unsqueeze(-2), grad_cov, alpha=2 / samples)
    linear_map.add_columns_(grad_x, unsplit_rows(grad_rows, list(columns.shape), linear_map.partition).to(grad_x.dtype))
