"""Which windows of a layer's input the statistics are taken from, and the way back for their gradient.

Sampling is linear in x and comes in two halves: `window_columns` gathers windows, `add_window_columns_` adds a gradient
of theirs to that of x in place, so that no dense, mostly zero gradient of x is made where windows are pixels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import DeconvCfg
from .partition import Partition

__all__ = ["Window", "add_window_columns_", "sampling_step", "window_columns"]

Step = tuple[int, int]


class Window(NamedTuple):
    """Geometry of a convolution's windows; padding is with zeros, the same on opposite sides."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]

    @property
    def pointwise(self) -> bool:
        return self.kernel_size == (1, 1)

    def windows(self, size: tuple[int, int], step: Step) -> int:
        """Number of windows in an image of (height, width) at a spacing of `step`; 0 if none fits."""
        spans = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(self.dilation, self.kernel_size, strict=True)]
        rows, cols = ((size[i] + 2 * self.padding[i] - spans[i]) // step[i] + 1 for i in (0, 1))
        return rows * cols if min(rows, cols) > 0 else 0


def window_columns(x: Tensor, window: Window, step: Step, grid: bool) -> Tensor:
    """Windows of images (N, C, H, W) at a spacing of `step`, zero padding counted as data: (..., K) features each.

    1x1 windows are the pixels of the batch as one flat list, every (step * step)-th of them, unless `grid`.
    """
    if not window.pointwise:
        return F.unfold(x, window.kernel_size, window.dilation, window.padding, step).mT
    if grid:
        return x[:, :, :: step[0], :: step[1]].permute(0, 2, 3, 1)
    pixels = x.permute(0, 2, 3, 1)
    if pixels.is_contiguous():
        return pixels.flatten(0, 2)[:: step[0] * step[1]]
    image, position = _flat_pixels(x, step)
    return x.flatten(2)[image, :, position]


def add_window_columns_(grad_x: Tensor, grad_columns: Tensor, window: Window, step: Step, grid: bool) -> None:
    """Add to grad_x (N, C, H, W), in place, what a gradient of `window_columns` (its shape) means for x."""
    if not window.pointwise:
        size = (grad_x.shape[2], grad_x.shape[3])
        grad_x += F.fold(grad_columns.mT, size, window.kernel_size, window.dilation, window.padding, step)
        return
    pixels = grad_x.permute(0, 2, 3, 1)
    if grid:
        pixels[:, :: step[0], :: step[1]] += grad_columns
    elif pixels.is_contiguous():
        pixels.flatten(0, 2)[:: step[0] * step[1]] += grad_columns
    else:
        image, position = _flat_pixels(grad_x, step)
        grad_x.view(*grad_x.shape[:2], -1)[image, :, position] += grad_columns


def sampling_step(x: Tensor, window: Window, partition: Partition, cfg: DeconvCfg) -> Step:
    """Spacing of the sampled windows: the largest sampling stride, at most the configured one, times the convolution's.

    It is reduced until there are `cfg.min_rows` * F rows, at most to 1.
    """
    per_window = partition.blocks // partition.sets
    for stride in range(cfg.sampling_stride, 1, -1):
        step = (stride * window.stride[0], stride * window.stride[1])
        if window.pointwise and not cfg.grid:
            windows = math.ceil(x.shape[0] * x.shape[2] * x.shape[3] / (step[0] * step[1]))
        else:
            windows = x.shape[0] * window.windows((x.shape[2], x.shape[3]), step)
        if windows * per_window >= cfg.min_rows * partition.features:
            return step
    return window.stride


def _flat_pixels(x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Image and position of every sampled pixel of the flat list."""
    pixels = torch.arange(0, x.shape[0] * x.shape[2] * x.shape[3], step[0] * step[1], device=x.device)
    return pixels // (x.shape[2] * x.shape[3]), pixels % (x.shape[2] * x.shape[3])
