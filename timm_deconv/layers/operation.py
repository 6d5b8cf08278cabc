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
    sum_blocks,
    unsplit_rows,
    unsplit_weight,
)
from .sampling import PIXEL, Window, add_window_columns_, choose_sampling, window_columns
from .whitening import count_padding, count_padding_backward, fold_bias, regularise, regularise_backward

__all__ = ["ConvMap", "LinearMap", "Map", "whitened_map"]

MOST_PADDING = 0.01
"""Most weight of padding in the statistics of blocks of channels: enough to bound what leaves at the border of an image
without variance, where D mu is near weight ** -0.5. Counting all of it cost a point of accuracy (README)."""

Gradients = tuple[Tensor | None, Tensor, Tensor]
Backward = tuple[Tensor | None, Tensor, Tensor, Tensor]
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

    @property
    def sampled(self) -> Window:
        """The windows that are samples: the convolution's, or single pixels of the image without its padding."""
        if self.window.pointwise:
            return self.window._replace(padding=(0, 0))
        return PIXEL if self._of_pixels else self.window

    @property
    def _of_pixels(self) -> bool:
        return self.cfg.layout == "channels" and self.partition.of_channels

    def padding_share(self, x: Tensor) -> float:
        """The weight in the statistics of padding that the convolution sees but that is not among the samples."""
        return min(self.window.padding_share((x.shape[2], x.shape[3])), MOST_PADDING) if self._of_pixels else 0.0

    def columns(self, x: Tensor) -> Tensor:
        """Sampled windows, (..., K)."""
        return window_columns(x, self.sampled, choose_sampling(x, self.sampled, self.partition, self.cfg))

    def add_columns_(self, grad_x: Tensor, grad_columns: Tensor) -> None:
        """Add the gradient of `columns(x)` to that of x."""
        sampling = choose_sampling(grad_x, self.sampled, self.partition, self.cfg)
        add_window_columns_(grad_x, grad_columns, self.sampled, sampling)


class LinearMap(NamedTuple):
    """A linear layer and the feature vectors (R, K) that it sees, each a sample."""

    partition: Partition
    cfg: DeconvCfg

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, with_x: bool) -> Gradients:
        """Gradients of x (None unless `with_x`), weight and bias."""
        return grad @ weight if with_x else None, grad.mT @ x, grad.sum(0)

    def padding_share(self, x: Tensor) -> float:
        """Nothing is padded."""
        return 0.0

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
            mean, cov = count_padding(mean, cov, linear_map.padding_share(x))
            whitener, iterates = isqrt_with_iterates(regularise(cov, rows.shape[-2], cfg), cfg.n_iter)
            if frozen is not None:
                assert running_mean is not None and running_whitener is not None
                mean = torch.where(frozen, running_mean, mean)
                whitener = torch.where(frozen, running_whitener, whitener)
            weight_rows = split_weight(weight.to(whitener.dtype), partition)
            sums = sum_blocks(weight_rows, weight.shape[0], partition)
            new_bias = fold_bias(bias, sums, mean, whitener, partition).to(dtype)
            if whitens_input(x, weight, partition):
                kept = weight.to(dtype)
                output = linear_map(_whiten_channels(x.to(dtype), whitener), kept, new_bias)
            else:
                folded = unsplit_weight(torch.bmm(weight_rows, whitener), list(weight.shape), partition)
                kept = _like(folded, weight).to(dtype)
                output = linear_map(x.to(dtype), kept, new_bias)
        ctx.save_for_backward(x, weight, kept, mean, whitener, sums, frozen, *iterates)
        ctx.linear_map, ctx.has_bias = linear_map, bias is not None
        ctx.mark_non_differentiable(mean, whitener)
        return output, mean, whitener

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _whitener: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept, mean, whitener, sums, frozen, *iterates = ctx.saved_tensors
        linear_map: Map = ctx.linear_map
        backward = _input_backward if whitens_input(x, weight, linear_map.partition) else _weight_backward
        with full_precision(x):
            grad = grad.to(kept.dtype)
            grad_x, grad_weight, grad_bias, grad_whitener = backward(
                grad, x, weight, kept, whitener, linear_map, ctx.needs_input_grad[0]
            )
            # w D mu, subtracted in the bias
            mean = mean.unsqueeze(-2)
            grad_outputs = spread_shift(grad_bias.to(whitener.dtype), linear_map.partition)
            _add_shift_gradient_(grad_weight, grad_outputs, torch.bmm(mean, whitener.mT))
            if grad_x is not None:
                grad_shift = torch.bmm(grad_outputs.unsqueeze(-2), sums).neg()
                grad_mean = torch.bmm(grad_shift, whitener)
                grad_whitener = torch.baddbmm(grad_whitener, grad_shift.mT, mean)
                if frozen is not None:
                    grad_mean, grad_whitener = (g.masked_fill(frozen, 0) for g in (grad_mean, grad_whitener))
                grad_x = grad_x.to(x.dtype)
                _add_statistics_gradient_(grad_x, x, linear_map, mean, grad_mean, grad_whitener, iterates)
            grad_weight = _like(unsplit_weight(grad_weight, list(weight.shape), linear_map.partition), weight)
        bias_gradient = grad_bias.to(weight.dtype) if ctx.has_bias else None
        return grad_x, grad_weight.to(weight.dtype), bias_gradient, None, None, None, None


def whitens_input(x: Tensor, weight: Tensor, partition: Partition) -> bool:
    """Whether D is applied to x and not to the weight, the same function: where that is fewer products.

    F products an element each: 3 times the weight (fold, two gradients), or 4 times x (as it is not kept).
    """
    return partition.of_channels and partition.groups == partition.sets == 1 and 4 * x.numel() < 3 * weight.numel()


def _whiten_channels(x: Tensor, whitener: Tensor) -> Tensor:
    """x (N, C, H, W) or (R, K) with a symmetric D (1, F, F) applied to every run of F channels."""
    matrix = whitener[0].to(x.dtype)
    if x.ndim == 2 or x.is_contiguous(memory_format=torch.channels_last):
        last = x if x.ndim == 2 else x.permute(0, 2, 3, 1)
        whitened = (last.reshape(-1, matrix.shape[0]) @ matrix).view(last.shape)
        return whitened if x.ndim == 2 else whitened.permute(0, 3, 1, 2)
    return (matrix @ x.reshape(-1, matrix.shape[0], x.shape[2] * x.shape[3])).view(x.shape)


def _input_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kept: Tensor, whitener: Tensor, linear_map: Map, with_x: bool
) -> Backward:
    """Gradients of x, of the weight's rows, of the bias and of D where D was applied to x."""
    low = x.to(kept.dtype)
    grad_whitened, grad_weight, grad_bias = linear_map.backward(grad, _whiten_channels(low, whitener), kept, with_x)
    grad_weight = split_weight(grad_weight.to(whitener.dtype), linear_map.partition)
    if grad_whitened is None:
        return None, grad_weight, grad_bias, torch.zeros_like(whitener)
    grad_whitener = _channel_rows(low, whitener).mT @ _channel_rows(grad_whitened, whitener)
    return _whiten_channels(grad_whitened, whitener), grad_weight, grad_bias, grad_whitener.to(whitener.dtype)[None]


def _weight_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kept: Tensor, whitener: Tensor, linear_map: Map, with_x: bool
) -> Backward:
    """The same where D was applied to the weight."""
    grad_x, grad_folded, grad_bias = linear_map.backward(grad, x.to(kept.dtype), kept, with_x)
    grad_rows = split_weight(grad_folded.to(whitener.dtype), linear_map.partition)
    rows = split_weight(weight.to(whitener.dtype), linear_map.partition)
    return grad_x, torch.bmm(grad_rows, whitener), grad_bias, torch.bmm(rows.mT, grad_rows)


def _channel_rows(x: Tensor, whitener: Tensor) -> Tensor:
    """x (N, C, H, W) or (R, K) as rows of F channels."""
    last = x if x.ndim == 2 else x.permute(0, 2, 3, 1)
    return last.reshape(-1, whitener.shape[-1])


def _add_shift_gradient_(grad_rows: Tensor, grad_outputs: Tensor, whitened_mean: Tensor) -> None:
    """Add to the gradient of the weight's rows (S, N, F), in place, that of the bias -w D mu.

    grad_outputs: (S, O / groups), whitened_mean: D mu, (S, 1, F).
    """
    of_outputs = grad_rows.unflatten(1, [grad_outputs.shape[1], -1])
    of_outputs.addcmul_(grad_outputs[..., None, None], whitened_mean.unsqueeze(2), value=-1)


def _like(values: Tensor, weight: Tensor) -> Tensor:
    """The values in the weight's memory format, which decides in which one a convolution runs."""
    return values.contiguous() if weight.is_contiguous() else values


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
    mean, grad_mean, grad_cov = count_padding_backward(mean, grad_mean, grad_cov, linear_map.padding_share(x))
    grad_rows = _times_symmetric(rows - mean, grad_cov, grad_mean / samples, 2 / samples)
    linear_map.add_columns_(grad_x, unsplit_rows(grad_rows, list(columns.shape), linear_map.partition).to(grad_x.dtype))


def _times_symmetric(rows: Tensor, matrices: Tensor, constant: Tensor, scale: float) -> Tensor:
    """scale rows M + constant of rows (S, R, F), symmetric M (S, F, F) and constant (S, 1, F), in the rows' layout."""
    if rows.is_contiguous():
        return torch.baddbmm(constant, rows, matrices, alpha=scale)
    return torch.baddbmm(constant.mT, matrices, rows.mT, alpha=scale).mT
