"""Whitening as pure functions: sampled rows of the input -> moments -> whitener -> folded weight and bias.

Ye et al., Network Deconvolution, ICLR 2020, sections 3 and 4 (algorithm 1): with the mean mu of the input windows
and the approximate inverse root D of their covariance, conv(D (x - mu)) = conv'(x) with weight w D and bias b - w D
mu. Gradients flow through mu and D.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import covariance, isqrt_newton_schulz, shrink
from .config import DeconvCfg
from .partition import Partition, split_rows, split_weight, sum_shift, unsplit_weight

__all__ = ["Window", "fold", "linear_rows", "whitener", "whitening_statistics", "window_rows"]


class Window(NamedTuple):
    """Geometry of a convolution's windows; `pads` as `F.pad` takes them: left, right, top, bottom."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    padding_mode: str

    @property
    def pointwise(self) -> bool:
        return self.kernel_size == (1, 1)

    def windows(self, size: tuple[int, int], step: tuple[int, int]) -> int:
        """Number of windows in an image of (height, width) at a spacing of `step`; not positive if none fits."""
        rows, cols = (
            (size[i] + self.pads[2 - 2 * i] + self.pads[3 - 2 * i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // step[i]
            + 1
            for i in (0, 1)
        )
        return rows * cols if min(rows, cols) > 0 else 0


def window_rows(x: Tensor, window: Window, partition: Partition, cfg: DeconvCfg) -> Tensor:
    """Sampled windows of images (N, C, H, W) as rows (S, R, F), zero padding counted as data.

    1x1 windows are the pixels of the batch as one flat list, every (sampling stride * stride)^2-th of them, unless
    `cfg.grid`.
    """
    stride = _sampling_stride(x, window, partition, cfg)
    step = (stride * window.stride[0], stride * window.stride[1])
    if window.pointwise and cfg.grid:
        columns = x[:, :, :: step[0], :: step[1]].permute(0, 2, 3, 1)
    elif window.pointwise:
        columns = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])[:: step[0] * step[1]]
    else:
        columns = _unfold(x, window, step).mT
    return split_rows(columns, partition)


def linear_rows(x: Tensor, partition: Partition) -> Tensor:
    """Every feature vector of (..., K) as rows (S, R, F)."""
    return split_rows(x, partition)


def whitening_statistics(rows: Tensor, cfg: DeconvCfg) -> tuple[Tensor, Tensor]:
    """Mean (S, F) and whitener (S, F, F) of rows (S, R, F), in float32 or better.

    Cost: R F^2 + 3 (n_iter - 1) F^3 multiply-accumulates for each of the S sets.
    """
    mean, cov = covariance(rows)
    return mean, whitener(cov, rows.shape[-2], cfg)


def whitener(cov: Tensor, samples: int, cfg: DeconvCfg) -> Tensor:
    """Approximate inverse root of covariances (..., F, F) estimated from `samples` rows, regularised as configured."""
    wanted = cfg.min_rows * cov.shape[-1]
    if samples < wanted:
        cov = shrink(cov, 1 - samples / wanted)
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    return isqrt_newton_schulz(cov + cfg.eps * eye, cfg.n_iter)


def fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor, whitener: Tensor, partition: Partition
) -> tuple[Tensor, Tensor]:
    """Weight w D and bias b - w D mu of the plain layer that does the whitened layer's work (paper, algorithm 1).

    Args:
        weight: (O, ...), a convolution's or a linear layer's.
        bias: (O,) or None.
        mean: (S, F) or flattened. whitener: (S, F, F), or (F, F) if S = 1.

    Returns:
        weight and bias of the layer's shapes, in the layer's dtype; computed in the statistics' dtype or better.
    """
    features = partition.features
    dtype = torch.promote_types(weight.dtype, whitener.dtype)
    rows = split_weight(weight.to(dtype), partition) @ whitener.to(dtype).reshape(-1, features, features)
    shift = sum_shift((rows @ mean.to(dtype).reshape(-1, features, 1)).squeeze(-1), partition)
    folded = unsplit_weight(rows, list(weight.shape), partition).to(weight.dtype)
    return folded, (-shift if bias is None else bias - shift).to(weight.dtype)


def _sampling_stride(x: Tensor, window: Window, partition: Partition, cfg: DeconvCfg) -> int:
    """The largest sampling stride, at most the configured one, that yields `cfg.min_rows` * F rows; 1 if none does."""
    per_window = partition.blocks // partition.sets
    for stride in range(cfg.sampling_stride, 1, -1):
        step = (stride * window.stride[0], stride * window.stride[1])
        if window.pointwise and not cfg.grid:
            windows = math.ceil(x.shape[0] * x.shape[2] * x.shape[3] / (step[0] * step[1]))
        else:
            windows = x.shape[0] * window.windows((x.shape[2], x.shape[3]), step)
        if windows * per_window >= cfg.min_rows * partition.features:
            return stride
    return 1


def _unfold(x: Tensor, window: Window, step: tuple[int, int]) -> Tensor:
    left, right, top, bottom = window.pads
    if left == right and top == bottom and window.padding_mode == "zeros":
        return F.unfold(x, window.kernel_size, window.dilation, (top, left), step)
    mode = "constant" if window.padding_mode == "zeros" else window.padding_mode
    return F.unfold(F.pad(x, window.pads, mode=mode), window.kernel_size, window.dilation, 0, step)
