"""Which windows of a batch the statistics are taken from, and the way back for their gradient.

Sampling is linear in x and comes in two halves: `window_columns` gathers windows, `add_window_columns_` adds a gradient
of theirs to that of x in place, so that no dense, mostly zero gradient of x is made.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import DeconvCfg
from .partition import Partition

__all__ = ["Sampling", "Window", "add_window_columns_", "as_pair", "choose_sampling", "spread_pixels", "window_columns"]

Pair = tuple[int, int]
Index = tuple[slice | int, ...]

FEWEST = 16
"""Positions of an image below which images are passed over and the spacing grows no more."""


def as_pair(value: Any) -> Pair:
    """Rows and columns of what may be one number for both."""
    rows, cols = (value, value) if isinstance(value, int) else value
    return rows, cols


class Window(NamedTuple):
    """Geometry of a convolution's windows; padding is with zeros, the same on opposite sides."""

    kernel_size: Pair
    stride: Pair
    dilation: Pair
    padding: Pair

    @property
    def pointwise(self) -> bool:
        return self.kernel_size == (1, 1)

    def starts(self, axis: int) -> list[int]:
        """Where each kernel position of the first window lies, rows or columns from the image; negative in padding."""
        return [k * self.dilation[axis] - self.padding[axis] for k in range(self.kernel_size[axis])]

    def grid(self, size: Pair, step: Pair) -> Pair:
        """Rows and columns of windows in an image of (height, width) at a spacing of `step`; 0 if none fits."""
        spans = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(self.dilation, self.kernel_size, strict=True)]
        rows, cols = (max((size[i] + 2 * self.padding[i] - spans[i]) // step[i] + 1, 0) for i in (0, 1))
        return rows, cols

    def windows(self, size: Pair, step: Pair) -> int:
        """Number of windows in an image of (height, width) at a spacing of `step`."""
        rows, cols = self.grid(size, step)
        return rows * cols

    def padding_share(self, size: Pair) -> float:
        """The part of what all windows in an image of (height, width) hold that is padding; 0 if it is all."""
        if not any(self.padding):
            return 0.0
        inside = 1.0
        for axis, windows in enumerate(self.grid(size, self.stride)):
            starts = self.starts(axis)
            seen = sum(len(_inside(start, self.stride[axis], windows, size[axis])) for start in starts)
            inside *= seen / max(windows * len(starts), 1)
        return 1 - inside if inside else 0.0


PIXEL = Window((1, 1), (1, 1), (1, 1), (0, 0))


class Sampling(NamedTuple):
    """Every `images`-th image, in it windows at a spacing of `step` from `offset` on; with `flat`, the pixels of the
    batch are one list of which every (step * step)-th is taken."""

    images: int
    step: Pair
    offset: Pair
    flat: bool


def choose_sampling(x: Tensor, window: Window, partition: Partition, cfg: DeconvCfg) -> Sampling:
    """The configured spacing times the convolution's own stride, reduced until there are `cfg.min_rows` * F rows, at
    most to that stride; or increased, down to FEWEST an image, and images passed over, to `cfg.most_rows`."""
    flat = window.pointwise and not cfg.grid and cfg.layout != "channels"
    size = (x.shape[2], x.shape[3])
    per_position = partition.blocks // partition.sets
    for spacing in range(cfg.sampling_stride, 0, -1):
        step = (spacing * window.stride[0], spacing * window.stride[1])
        if flat:
            positions = math.ceil(x.shape[0] * x.shape[2] * x.shape[3] / (step[0] * step[1]))
        else:
            positions = x.shape[0] * window.windows(size, step)
        if positions * per_position >= cfg.min_rows * partition.features:
            break
    most = max(cfg.most_rows(partition.features) // per_position, 1)
    if not cfg.max_rows or positions <= most:
        return Sampling(1, step, (0, 0), flat)
    return _sparser(x.shape[0], size, window, step, most)


def _sparser(images: int, size: Pair, window: Window, step: Pair, most: int) -> Sampling:
    wider = (step[0] + 1, step[1] + 1)
    while images * window.windows(size, step) > most and window.windows(size, wider) >= FEWEST:
        step, wider = wider, (wider[0] + 1, wider[1] + 1)
    rows, cols = window.grid(size, step)
    offset = (0, 0)
    if window.pointwise:
        offset = ((size[0] - 1 - (rows - 1) * step[0]) // 2, (size[1] - 1 - (cols - 1) * step[1]) // 2)
    wanted = max(most // (rows * cols), 1)
    return Sampling(math.ceil(images / wanted), step, offset, False)


def window_columns(x: Tensor, window: Window, sampling: Sampling, *, samples_last: bool = False) -> Tensor:
    """Windows of images (N, C, H, W), zero padding counted as data: (..., K) features each, channel-major.

    Args:
        samples_last: gather windows of more than a pixel into memory where all samples of a feature follow one another.
    """
    x = x[:: sampling.images]
    if not window.pointwise:
        return _gather_windows(x, window, sampling.step, samples_last)
    if not sampling.flat:
        return _pixel_grid(x, sampling)
    pixels = x.permute(0, 2, 3, 1)
    if pixels.is_contiguous():
        return pixels.flatten(0, 2)[:: sampling.step[0] * sampling.step[1]]
    image, position = _flat_pixels(x, sampling.step)
    return x.flatten(2)[image, :, position]


def spread_pixels(x: Tensor, stride: Pair, most: int) -> Tensor:
    """Pixels of images (N, C, H, W) on a grid of `stride`, evenly spread over the batch: (at most `most`, C)."""
    x = x[:, :, :: stride[0], :: stride[1]]
    total, in_image, width = x.shape[0] * x.shape[2] * x.shape[3], x.shape[2] * x.shape[3], x.shape[3]
    count = min(most, total)
    index = (torch.arange(count, device=x.device) * total + total // 2) // count
    inside = index % in_image
    return x[index // in_image, :, inside // width, inside % width]


def add_window_columns_(grad_x: Tensor, grad_columns: Tensor, window: Window, sampling: Sampling) -> None:
    """Add to grad_x (N, C, H, W), in place, what a gradient of `window_columns` (its shape) means for x."""
    grad_x = grad_x[:: sampling.images]
    pixels = grad_x.permute(0, 2, 3, 1)
    if not window.pointwise:
        _add_windows_(grad_x, grad_columns, window, sampling.step)
    elif not sampling.flat:
        _pixel_grid(grad_x, sampling).add_(grad_columns)
    elif pixels.is_contiguous():
        pixels.flatten(0, 2)[:: sampling.step[0] * sampling.step[1]] += grad_columns
    else:
        image, position = _flat_pixels(grad_x, sampling.step)
        grad_x.view(*grad_x.shape[:2], -1)[image, :, position] += grad_columns


def _pixel_grid(x: Tensor, sampling: Sampling) -> Tensor:
    """(N, rows, columns, C), a view."""
    (top, left), (rows, cols) = sampling.offset, sampling.step
    return x[:, :, top::rows, left::cols].permute(0, 2, 3, 1)


def _gather_windows(x: Tensor, window: Window, step: Pair, samples_last: bool) -> Tensor:
    """(N, windows, K); `F.unfold` does the same, several times slower where windows are sparse or in channels_last."""
    samples = (x.shape[0], *window.grid((x.shape[2], x.shape[3]), step))
    features = (x.shape[1], *window.kernel_size)
    if samples_last:
        columns = x.new_empty(*features, *samples).permute(3, 4, 5, 0, 1, 2)
    else:
        columns = x.new_empty(*samples, *features)
    _zero_border_(columns, window, (x.shape[2], x.shape[3]), step)
    for of_columns, of_x in _kernel_positions(x, window, step):
        columns[of_columns] = x[of_x].permute(0, 2, 3, 1)
    return columns.flatten(3).flatten(1, 2)


def _zero_border_(columns: Tensor, window: Window, size: Pair, step: Pair) -> None:
    """Zero the windows, of (N, rows, columns, ...), that reach into the padding, in an image of (height, width)."""
    for axis in (0, 1):
        windows = columns.shape[axis + 1]
        inside = [_inside(start, step[axis], windows, size[axis]) for start in window.starts(axis)]
        first = min(max(span.start for span in inside), windows)
        last = max(min(span.stop for span in inside), 0)
        columns.narrow(axis + 1, 0, first).zero_()
        columns.narrow(axis + 1, last, windows - last).zero_()


def _add_windows_(grad_x: Tensor, grad_columns: Tensor, window: Window, step: Pair) -> None:
    grid = window.grid((grad_x.shape[2], grad_x.shape[3]), step)
    columns = grad_columns.unflatten(-1, [-1, *window.kernel_size]).unflatten(1, grid)
    for of_columns, of_x in _kernel_positions(grad_x, window, step):
        grad_x[of_x] += columns[of_columns].permute(0, 3, 1, 2)


def _kernel_positions(x: Tensor, window: Window, step: Pair) -> Iterator[tuple[Index, Index]]:
    """For every kernel position: its place in columns (N, rows, columns, C, kernel height, kernel width), without the
    windows where it lies in the padding; and its pixels in x (N, C, H, W)."""
    size = (x.shape[2], x.shape[3])
    rows, cols = window.grid(size, step)
    everything = slice(None)
    for (i, top), (j, left) in itertools.product(enumerate(window.starts(0)), enumerate(window.starts(1))):
        in_rows, pixel_rows = _slices(_inside(top, step[0], rows, size[0]), top, step[0])
        in_cols, pixel_cols = _slices(_inside(left, step[1], cols, size[1]), left, step[1])
        yield (everything, in_rows, in_cols, everything, i, j), (everything, everything, pixel_rows, pixel_cols)


def _inside(start: int, step: int, windows: int, size: int) -> range:
    """Of so many windows, whose pixels are start, start + step ...: those whose pixel is inside 0 ... size - 1."""
    return range(max(math.ceil(-start / step), 0), min((size - 1 - start) // step, windows - 1) + 1)


def _slices(windows: range, start: int, step: int) -> tuple[slice, slice]:
    """Of windows, and of their pixels start, start + step ..."""
    if not windows:
        return slice(0, 0), slice(0, 0)
    first, last = windows[0], windows[-1]
    return slice(first, last + 1), slice(start + first * step, start + last * step + 1, step)


def _flat_pixels(x: Tensor, step: Pair) -> tuple[Tensor, Tensor]:
    """Image and position of every sampled pixel of the flat list."""
    pixels = torch.arange(0, x.shape[0] * x.shape[2] * x.shape[3], step[0] * step[1], device=x.device)
    return pixels // (x.shape[2] * x.shape[3]), pixels % (x.shape[2] * x.shape[3])
