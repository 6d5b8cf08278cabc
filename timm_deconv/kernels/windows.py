"""Windows of a batch of images: their geometry, which of them are sampled, and the way back for a gradient.

Sampling is linear in x and comes in two halves: `gather` makes columns of windows, `scatter_add_` adds a gradient of
theirs to that of x in place, so that no dense, mostly zero gradient of x is made.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import on_cpu

__all__ = [
    "PIXEL",
    "Sampling",
    "Share",
    "Window",
    "as_pair",
    "gather",
    "scatter_add_",
    "spread_places",
    "spread_windows",
]

Pair = tuple[int, int]
Index = tuple[slice | int, ...]


def as_pair(value: Any) -> Pair:
    """Return rows and columns of what may be one number for both."""
    rows, cols = (value, value) if isinstance(value, int) else value
    return rows, cols


class Window(NamedTuple):
    """Geometry of a convolution's windows; padding is with zeros, the same on opposite sides."""

    kernel_size: Pair
    stride: Pair
    dilation: Pair
    padding: Pair

    @property
    def numbers(self) -> list[int]:
        """The window as an operator takes it."""
        return list(itertools.chain(*self))

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> "Window":
        """Return the window that `numbers` was made of."""
        return cls(*zip(numbers[::2], numbers[1::2], strict=True))

    @property
    def pointwise(self) -> bool:
        """Whether a window is one pixel."""
        return self.kernel_size == (1, 1)

    def starts(self, axis: int) -> list[int]:
        """Return where each kernel position of the first window lies, rows or columns from the image's edge; negative
        in the padding."""
        return [k * self.dilation[axis] - self.padding[axis] for k in range(self.kernel_size[axis])]

    def grid(self, size: Pair) -> Pair:
        """Return the rows and columns of windows in an image of (height, width); 0 if none fits."""
        spans = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(self.dilation, self.kernel_size, strict=True)]
        rows, cols = (max((size[i] + 2 * self.padding[i] - spans[i]) // self.stride[i] + 1, 0) for i in (0, 1))
        return rows, cols

    def positions(self, size: Pair) -> int:
        """Return the number of windows in an image of (height, width)."""
        rows, cols = self.grid(size)
        return rows * cols

    def padding_share(self, size: Pair) -> float:
        """Return the part of what all windows in an image of (height, width) hold that is padding; 0 if it is all."""
        if not any(self.padding):
            return 0.0
        inside = 1.0
        for axis, windows in enumerate(self.grid(size)):
            starts = self.starts(axis)
            seen = sum(len(_inside(start, self.stride[axis], windows, size[axis])) for start in starts)
            inside *= seen / max(windows * len(starts), 1)
        return 1 - inside if inside else 0.0


PIXEL = Window((1, 1), (1, 1), (1, 1), (0, 0))


class Sampling(NamedTuple):
    """Which windows of a batch are samples.

    Attributes:
        window: its stride is the spacing of the samples.
        images: one image in so many is sampled, beginning with the first.
        offset: row and column of the first sampled pixel; (0, 0) for windows of more than a pixel.
        flat: the pixels of the whole batch are one list, of which every (stride * stride)-th is taken, `offset` being
            (0, the place of the first).
    """

    window: Window
    images: int = 1
    offset: Pair = (0, 0)
    flat: bool = False

    @property
    def numbers(self) -> list[int]:
        """The sampling as an operator takes it."""
        return [*itertools.chain(*self.window, self.offset), self.images, int(self.flat)]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> "Sampling":
        """Return the sampling that `numbers` was made of."""
        *pairs, images, flat = numbers
        *window, offset = zip(pairs[::2], pairs[1::2], strict=True)
        return cls(Window(*window), images, offset, bool(flat))

    def positions(self, shape: Sequence[int]) -> int:
        """Return the number of windows sampled from a batch of shape (N, C, H, W)."""
        (rows, cols), size = self.window.stride, (shape[2], shape[3])
        if self.flat:
            return max(math.ceil((shape[0] * size[0] * size[1] - self.offset[1]) / (rows * cols)), 0)
        inside = (size[0] - self.offset[0], size[1] - self.offset[1])
        return math.ceil(shape[0] / self.images) * self.window.positions(inside)


class Share(NamedTuple):
    """Which images of a batch that several processes hold together are those of one of them.

    Attributes:
        first: place of its first image in the whole batch. whole: images of all processes.
    """

    first: int
    whole: int


def gather(x: Tensor, sampling: Sampling, *, samples_last: bool = False) -> Tensor:
    """Gather sampled windows of images (N, C, H, W), zero padding counted as data: (..., K), channel-major.

    Args:
        samples_last: gather windows of more than a pixel into memory where all samples of a feature follow one another.
    """
    x, window = x[:: sampling.images], sampling.window
    if not window.pointwise:
        return _gather_windows(x, window, samples_last)
    if not sampling.flat:
        return _pixel_grid(x, sampling)
    pixels = x.permute(0, 2, 3, 1)
    if pixels.is_contiguous():
        return pixels.flatten(0, 2)[_flat_places(sampling)]
    image, position = _flat_pixels(x, sampling)
    return x.flatten(2)[image, :, position]


def scatter_add_(grad_x: Tensor, grad_columns: Tensor, sampling: Sampling) -> None:
    """Add to grad_x (N, C, H, W), in place, what a gradient of `gather` (its shape) means for x."""
    grad_x, window = grad_x[:: sampling.images], sampling.window
    if not window.pointwise:
        _scatter_windows_(grad_x, grad_columns, window)
    elif not sampling.flat:
        _pixel_grid(grad_x, sampling).add_(grad_columns)
    else:
        pixels = grad_x.permute(0, 2, 3, 1)
        if pixels.is_contiguous():
            pixels.flatten(0, 2)[_flat_places(sampling)] += grad_columns
        else:
            image, position = _flat_pixels(grad_x, sampling)
            grad_x.view(*grad_x.shape[:2], -1)[image, :, position] += grad_columns


def spread_windows(x: Tensor, window: Window, most: int, share: Share | None = None) -> Tensor:
    """Gather at most `most` windows of images (N, C, H, W), evenly spread over the batch: (count, K), channel-major.

    Where the images are a share of a larger batch, the windows are spread over that, and those in x are gathered.
    """
    (height, width), (_, cols) = x.shape[2:], window.grid((x.shape[2], x.shape[3]))
    in_image, (first, whole) = window.positions((height, width)), share or Share(0, x.shape[0])
    total, chosen = whole * in_image, spread_places(x.shape, window, most, share)
    index = torch.arange(chosen.start, chosen.stop, device=x.device)
    index = (index * total + total // 2) // min(most, total) - first * in_image
    pixels = x.permute(0, 2, 3, 1)
    if window == PIXEL and pixels.is_contiguous():  # as fast as memory
        return pixels.flatten(0, 2).index_select(0, index)
    image, place = index // in_image, index % in_image
    row, col = place // cols, place % cols
    if window == PIXEL._replace(stride=window.stride):
        return x[:, :, :: window.stride[0], :: window.stride[1]][image, :, row, col]
    top, left = row * window.stride[0], col * window.stride[1]
    down, right = (torch.arange(window.kernel_size[i], device=x.device) * window.dilation[i] for i in (0, 1))
    down = top[:, None, None] + down[:, None] - window.padding[0]
    right = left[:, None, None] + right - window.padding[1]
    inside = (down >= 0) & (down < height) & (right >= 0) & (right < width)
    values = x[image[:, None, None], :, down.clamp(0, height - 1), right.clamp(0, width - 1)]
    return values.where(inside.unsqueeze(-1), 0).permute(0, 3, 1, 2).flatten(1)


def spread_places(shape: Sequence[int], window: Window, most: int, share: Share | None = None) -> range:
    """Return which of the windows that are spread over a batch lie in a share of it, (N, C, H, W), by their number."""
    in_image = window.positions((shape[2], shape[3]))
    first, whole = share or Share(0, shape[0])
    total = whole * in_image
    count = min(most, total)
    if share is None:
        return range(count)
    start, stop = (-((total // 2 - image * in_image * count) // total) for image in (first, first + shape[0]))
    return range(max(start, 0), stop)


def _pixel_grid(x: Tensor, sampling: Sampling) -> Tensor:
    """View the sampled pixels as (N, rows, columns, C)."""
    (top, left), (rows, cols) = sampling.offset, sampling.window.stride
    return x[:, :, top::rows, left::cols].permute(0, 2, 3, 1)


def _gather_windows(x: Tensor, window: Window, samples_last: bool) -> Tensor:
    """Gather copies (N, windows, K) as `F.unfold` does, which is several times slower where windows are sparse or in
    channels_last. A CPU copies position by position, the fastest way; elsewhere a copy costs what it takes to begin.
    """
    if not on_cpu(x):
        order = (3, 4, 5, 0, 1, 2) if samples_last else (0, 1, 2, 3, 4, 5)
        windows = _view_windows(x, window).permute(order).clone(memory_format=torch.contiguous_format)
        return windows.permute(order).flatten(3).flatten(1, 2)
    size = (x.shape[2], x.shape[3])
    samples, features = (x.shape[0], *window.grid(size)), (x.shape[1], *window.kernel_size)
    if samples_last:
        columns = x.new_empty(*features, *samples).permute(3, 4, 5, 0, 1, 2)
    else:
        columns = x.new_empty(*samples, *features)
    _zero_border_(columns, window, size)
    for of_columns, of_x in _kernel_positions(x, window):
        columns[of_columns] = x[of_x].permute(0, 2, 3, 1)
    return columns.flatten(3).flatten(1, 2)


def _view_windows(x: Tensor, window: Window) -> Tensor:
    """View the windows of images (N, C, H, W), padded if need be, as (N, rows, columns, C, height, width)."""
    above, beside = window.padding
    padded = F.pad(x, (beside, beside, above, above)) if above or beside else x
    image, channel, down, right = padded.stride()
    (row_step, col_step), (far_down, far_right) = window.stride, window.dilation
    size = (x.shape[0], *window.grid((x.shape[2], x.shape[3])), x.shape[1], *window.kernel_size)
    steps = (image, down * row_step, right * col_step, channel, down * far_down, right * far_right)
    return padded.as_strided(size, steps)


def _zero_border_(columns: Tensor, window: Window, size: Pair) -> None:
    """Zero the windows, of (N, rows, columns, ...), that reach into the padding, in an image of (height, width)."""
    for axis in (0, 1):
        windows = columns.shape[axis + 1]
        inside = [_inside(start, window.stride[axis], windows, size[axis]) for start in window.starts(axis)]
        first = min(max(span.start for span in inside), windows)
        last = max(min(span.stop for span in inside), 0)
        columns.narrow(axis + 1, 0, first).zero_()
        columns.narrow(axis + 1, last, windows - last).zero_()


def _scatter_windows_(grad_x: Tensor, grad_columns: Tensor, window: Window) -> None:
    grid = window.grid((grad_x.shape[2], grad_x.shape[3]))
    columns = grad_columns.unflatten(-1, [-1, *window.kernel_size]).unflatten(1, grid)
    for of_columns, of_x in _kernel_positions(grad_x, window):
        grad_x[of_x] += columns[of_columns].permute(0, 3, 1, 2)


def _kernel_positions(x: Tensor, window: Window) -> Iterator[tuple[Index, Index]]:
    """Yield, for every kernel position, its place in columns (N, rows, columns, C, kernel height, kernel width) and its
    pixels in x (N, C, H, W), without the windows where it lies in the padding."""
    size = (x.shape[2], x.shape[3])
    rows, cols = window.grid(size)
    everything = slice(None)
    for (i, top), (j, left) in itertools.product(enumerate(window.starts(0)), enumerate(window.starts(1))):
        in_rows, pixel_rows = _slices(_inside(top, window.stride[0], rows, size[0]), top, window.stride[0])
        in_cols, pixel_cols = _slices(_inside(left, window.stride[1], cols, size[1]), left, window.stride[1])
        yield (everything, in_rows, in_cols, everything, i, j), (everything, everything, pixel_rows, pixel_cols)


def _inside(start: int, step: int, windows: int, size: int) -> range:
    """Return the indices of the windows, whose pixels are start, start + step ..., that lie inside 0 ... size - 1."""
    return range(max(math.ceil(-start / step), 0), min((size - 1 - start) // step, windows - 1) + 1)


def _slices(windows: range, start: int, step: int) -> tuple[slice, slice]:
    """Return slices of windows, and of their pixels start, start + step ..."""
    if not windows:
        return slice(0, 0), slice(0, 0)
    first, last = windows[0], windows[-1]
    return slice(first, last + 1), slice(start + first * step, start + last * step + 1, step)


def _flat_places(sampling: Sampling) -> slice:
    """Return the places of the sampled pixels in the flat list."""
    rows, cols = sampling.window.stride
    return slice(sampling.offset[1], None, rows * cols)


def _flat_pixels(x: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return image and position of every sampled pixel of the flat list."""
    in_image, places = x.shape[2] * x.shape[3], _flat_places(sampling)
    pixels = torch.arange(places.start, max(x.shape[0] * in_image, places.start), places.step, device=x.device)
    return pixels // in_image, pixels % in_image
