"""Peers, restated plainly: the published operation sequence, oracle of the tests too, and iterative normalisation.

Ye et al., Network Deconvolution, ICLR 2020, algorithm 1, with the settings and quirks of its released code, written
from a description of what that code computes. Every operation is a separate one for autograd; nothing is saved, shared
or skipped. Not for use in networks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deconv.layers.geometry import largest_divisor
from timm_deconv.linalg import (
    Norm,
    check_n_iter,
    check_square,
    covariance,
    eye_like,
    full_precision,
    matrix_norm,
    promote,
)

__all__ = [
    "IterativeNorm2d",
    "PublishedChannel",
    "PublishedConv2d",
    "PublishedLinear",
    "isqrt_newton_schulz_uncoupled",
    "published_isqrt",
]


def isqrt_newton_schulz_uncoupled(cov: Tensor, n_iter: int = 5, norm: Norm = "frobenius") -> Tensor:
    """Iterate Z <- (3 Z - Z^3 A) / 2 with A = cov / ||cov||, the vanilla form, which paper figure 7 compares.

    Unstable: rounding errors grow from about 10 steps in float32 and 15 in float64. Arguments, result and errors as in
    `timm_deconv.linalg.isqrt_newton_schulz`; 3 products a step, none in the first.
    """
    check_square(cov)
    check_n_iter(n_iter)
    with full_precision(cov):
        cov = promote(cov)
        scale = matrix_norm(cov, norm)
        a = cov / scale
        z = 1.5 * eye_like(a) - 0.5 * a
        for _ in range(n_iter - 1):
            z = 1.5 * z - 0.5 * (z @ z @ z @ a)
        return z / scale.sqrt()


def published_isqrt(cov: Tensor, n_iter: int) -> Tensor:
    """Compute inverse square roots by coupled Newton-Schulz steps from Y = A / ||A||_F, Z = I.

    (..., F, F) -> (..., F, F); three products a step, 15 in all for five steps (section 4.5.3).
    """
    norm = cov.square().sum((-2, -1), keepdim=True).sqrt()
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device).expand_as(cov)
    y, z = cov / norm, eye
    for _ in range(n_iter):
        t = 0.5 * (3.0 * eye - z @ y)
        y, z = y @ t, t @ z
    return z / norm.sqrt()


def published_block(channels: int, block: int) -> int:
    """Return the block that is used: all channels if it is larger, else their greatest common divisor."""
    return channels if block > channels else math.gcd(block, channels)


class PublishedConv2d(nn.Conv2d):
    """A convolution of whitened windows: square kernel, zero padding, a bias.

    Buffers: `running_mean` (F) and `running_deconv` (F, F) with F = kernel^2 * block; (kernel^2 * in_channels) and
    (groups, F, F) with groups, each of which is a block. The freeze counter is a plain integer, not saved (published).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float = 0.1,
        block: int = 64,
        sampling_stride: int = 3,
        freeze: bool = False,
        freeze_iter: int = 100,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.eps, self.n_iter, self.momentum = eps, n_iter, momentum
        self.freeze, self.freeze_iter, self.counter = freeze, freeze_iter, 0
        self.sampling_step = sampling_stride * stride
        block = in_channels // groups if groups > 1 else published_block(in_channels, block)
        self.blocks = in_channels // block
        self.features = kernel_size**2 * block
        self.register_buffer("running_mean", torch.zeros(self.features * (groups if groups > 1 else 1)))
        eye = torch.eye(self.features)
        self.register_buffer("running_deconv", eye.repeat(groups, 1, 1) if groups > 1 else eye)

    def forward(self, x: Tensor) -> Tensor:
        mean, whitener = self._statistics(x)
        fold = self._fold_groups if self.groups > 1 else self._fold_blocks
        weight, shift = fold(mean, whitener)
        return F.conv2d(x, weight, self.bias - shift, self.stride, self.padding, self.dilation, self.groups)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        frozen = self.freeze and self.counter > self.freeze_iter
        if self.training:
            self.counter = (self.counter + 1) % (10 * self.freeze_iter)
        if frozen or not self.training:
            return self.running_mean, self.running_deconv
        rows = self._rows(x)
        mean = rows.mean(-2)
        centred = rows - mean.unsqueeze(-2)
        eye = torch.eye(self.features, dtype=x.dtype, device=x.device)
        whitener = published_isqrt(centred.mT @ centred / rows.shape[-2] + self.eps * eye, self.n_iter)
        _average(self.running_mean, mean.reshape(-1), self.momentum)
        _average(self.running_deconv, whitener, self.momentum)
        return mean.reshape(-1), whitener

    def _rows(self, x: Tensor) -> Tensor:
        """Sample windows (N, C, H, W) -> (R, F), or (groups, R, F)."""
        if self.kernel_size == (1, 1):
            columns = x.permute(0, 2, 3, 1).reshape(-1, self.in_channels)[:: self.sampling_step**2]
        else:
            columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.sampling_step)
            columns = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        if self.groups > 1:
            return columns.reshape(-1, self.groups, self.features).transpose(0, 1)
        # Interleaved: block j holds the columns congruent to j modulo the number of blocks.
        return columns.reshape(-1, self.features, self.blocks).transpose(1, 2).reshape(-1, self.features)

    def _fold_blocks(self, mean: Tensor, whitener: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self.weight.reshape(self.out_channels, self.features, self.blocks).transpose(1, 2)
        blocks = blocks.reshape(-1, self.features) @ whitener
        shift = (blocks @ mean).reshape(self.out_channels, self.blocks).sum(1)
        weight = blocks.reshape(self.out_channels, self.blocks, self.features).transpose(1, 2)
        return weight.reshape(self.weight.shape), shift

    def _fold_groups(self, mean: Tensor, whitener: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight.reshape(self.groups, -1, self.features) @ whitener
        shift = weight @ mean.reshape(self.groups, self.features, 1)
        return weight.reshape(self.weight.shape), shift.reshape(-1)


class PublishedLinear(nn.Linear):
    """A linear layer of whitened runs of `block` contiguous features.

    (..., in_features) -> (..., out_features). Buffers: `running_mean` (block), `running_deconv` (block, block).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float = 0.1,
        block: int = 512,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.eps, self.n_iter, self.momentum = eps, n_iter, momentum
        self.block = published_block(in_features, block)
        self.register_buffer("running_mean", torch.zeros(self.block))
        self.register_buffer("running_deconv", torch.eye(self.block))

    def forward(self, x: Tensor) -> Tensor:
        mean, whitener = self.running_mean, self.running_deconv
        if self.training:
            rows = x.reshape(-1, self.block)
            mean = rows.mean(0)
            centred = rows - mean
            eye = torch.eye(self.block, dtype=x.dtype, device=x.device)
            whitener = published_isqrt(centred.T @ centred / rows.shape[0] + self.eps * eye, self.n_iter)
            _average(self.running_mean, mean, self.momentum)
            _average(self.running_deconv, whitener, self.momentum)
        weight = self.weight.reshape(-1, self.block) @ whitener
        shift = (weight @ mean).reshape(self.out_features, -1).sum(1)
        bias = -shift if self.bias is None else self.bias - shift
        return F.linear(x, weight.reshape(self.weight.shape), bias)


class PublishedChannel(nn.Module):
    """Whitened activations (N, C) or (N, C, H, W) -> the same.

    floor(C / block) * block channels are whitened; the rest share one mean and variance. The second moment is not
    centred, as published.
    """

    def __init__(
        self, block: int, *, eps: float = 1e-2, n_iter: int = 5, momentum: float = 0.1, sampling_stride: int = 3
    ) -> None:
        super().__init__()
        self.block, self.eps, self.n_iter, self.momentum = block, eps, n_iter, momentum
        self.sampling_stride = sampling_stride
        self.register_buffer("running_mean1", torch.zeros(block, 1))
        self.register_buffer("running_deconv", torch.eye(block))
        self.register_buffer("running_mean2", torch.zeros(1, 1))
        self.register_buffer("running_var", torch.ones(1, 1))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        whitened = x.shape[1] // self.block * self.block
        parts = [self._whiten(x[:, :whitened], x.shape)] if whitened else []
        if whitened < x.shape[1]:
            parts.append(self._normalise(x[:, whitened:], x.shape))
        if self.training:
            self.num_batches_tracked += 1
        return torch.cat(parts, 1)

    def _whiten(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Whiten runs of channels; row i of the matrix holds the i-th one of every run, of all images and positions."""
        swapped = x.transpose(0, 1)
        matrix = swapped.reshape(self.block, -1)
        mean, whitener = self.running_mean1, self.running_deconv
        if self.training:
            samples = self._sample(matrix, shape)
            mean = samples.mean(1, keepdim=True)
            eye = torch.eye(self.block, dtype=x.dtype, device=x.device)
            whitener = published_isqrt(samples @ samples.T / samples.shape[1] + self.eps * eye, self.n_iter)
            self._track(self.running_mean1, mean)
            self._track(self.running_deconv, whitener)
        return (whitener @ (matrix - mean)).reshape(swapped.shape).transpose(0, 1)

    def _normalise(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Normalise the remaining channels; those of an image are one row, and sampled as one."""
        mean, variance = self.running_mean2, self.running_var
        if self.training:
            samples = self._sample(x.reshape(x.shape[0], -1), shape)
            mean, variance = samples.mean().reshape(1, 1), samples.var().reshape(1, 1)
            self._track(self.running_mean2, mean)
            self._track(self.running_var, variance)
        flat = x.reshape(x.shape[0], -1)
        return ((flat - mean) / (variance + self.eps).sqrt()).reshape(x.shape)

    def _sample(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        stride = self.sampling_stride
        large = len(shape) == 4 and min(shape[2:]) >= stride > 1
        return matrix[:, :: stride**2] if large else matrix

    def _track(self, buffer: Tensor, value: Tensor) -> None:
        """Move a running value towards that of the batch; the first batch sets it."""
        _average(buffer, value, self.momentum if self.num_batches_tracked else 1.0)


@torch.no_grad()
def _average(buffer: Tensor, value: Tensor, momentum: float) -> None:
    buffer.mul_(1 - momentum).add_(value, alpha=momentum)


class IterativeNorm2d(nn.Module):
    """Iterative normalisation of channels behind a convolution (Huang et al., Iterative Normalization, CVPR 2019).

    (N, C, H, W) -> the same: groups of `block` channels, each whitened by its own covariance over all images and pixels
    (section 3.1: five uncoupled steps, normalised by the trace), then scale and shift of each channel. A block that
    does not divide the channels falls back to their largest divisor below it.
    """

    def __init__(
        self, channels: int, block: int = 64, *, n_iter: int = 5, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.block = largest_divisor(channels, block)
        self.n_iter, self.eps, self.momentum = n_iter, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        groups = channels // self.block
        self.register_buffer("running_mean", torch.zeros(groups, self.block))
        self.register_buffer("running_whitener", torch.eye(self.block).repeat(groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(-1, *self.running_mean.shape).transpose(0, 1)
        mean, whitener = self.running_mean, self.running_whitener
        if self.training:
            mean, cov = covariance(rows)
            eye = torch.eye(self.block, dtype=cov.dtype, device=cov.device)
            whitener = isqrt_newton_schulz_uncoupled(cov + self.eps * eye, self.n_iter, norm="trace")
            _average(self.running_mean, mean, self.momentum)
            _average(self.running_whitener, whitener, self.momentum)
        whitened = (rows - mean.unsqueeze(1)).to(whitener.dtype) @ whitener
        shape = [x.shape[0], *x.shape[2:], x.shape[1]]
        whitened = whitened.transpose(0, 1).reshape(shape) * self.weight + self.bias
        return whitened.permute(0, 3, 1, 2).to(x.dtype)
