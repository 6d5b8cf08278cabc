"""A convolution as whitening sees it: its windows, how they are sampled, and the way back."""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import DeconvCfg
from .partition import Partition
from .sampling import PIXEL, Window, add_window_columns_, choose_sampling, spread_pixels, window_columns

__all__ = ["ConvMap", "Gradients"]

MOST_PADDING = 0.01
"""Most weight of padding in the statistics of blocks of channels: enough to bound what leaves at the border of an image
without variance, where D mu is near weight ** -0.5. Counting all of it cost a point of accuracy (README)."""

Gradients = tuple[Tensor | None, Tensor, Tensor]


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
        """Gradients of x (None unless `with_x`), weight and bias.

        That of the bias is summed apart: a processor was seen to take 5 ms for it in the convolution's own backward
        pass, and 0.8 ms for the sum.
        """
        window, needed = self.window, [with_x, True, False]
        geometry = (window.stride, window.padding, window.dilation, False, [0, 0], self.groups)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, [0], *geometry, needed)
        return grad_x, grad_weight, grad.sum((0, 2, 3))

    @property
    def sampled(self) -> Window:
        """The windows that are samples: the convolution's, or single pixels of the image without its padding."""
        if self.window.pointwise:
            return self.window._replace(padding=(0, 0))
        return PIXEL if self._of_pixels else self.window

    @property
    def _of_pixels(self) -> bool:
        return self.cfg.layout == "channels" and self.partition.of_channels

    @property
    def copies(self) -> bool:
        """Whether the samples are copies for certain, and no view of the input."""
        return not self.sampled.pointwise

    def most_rows(self, x: Tensor) -> int:
        """Rows of a set of statistics if all windows that the convolution sees in x were sampled."""
        windows = self.sampled.windows((x.shape[2], x.shape[3]), self.sampled.stride)
        return x.shape[0] * windows * (self.partition.blocks // self.partition.sets)

    def padding_share(self, x: Tensor) -> float:
        """The weight in the statistics of padding that the convolution sees but that is not among the samples."""
        return min(self.window.padding_share((x.shape[2], x.shape[3])), MOST_PADDING) if self._of_pixels else 0.0

    def columns(self, x: Tensor) -> Tensor:
        """Sampled windows, (..., K), laid out as `split_rows` wants them."""
        sampling = choose_sampling(x, self.sampled, self.partition, self.cfg)
        return window_columns(x, self.sampled, sampling, samples_last=not self.partition.shared)

    def other_columns(self, x: Tensor, most: int) -> Tensor | None:
        """Pixels that the convolution sees, sampled or not, (at most `most`, K); None where it sees windows."""
        return spread_pixels(x, self.sampled.stride, most) if self.sampled.pointwise else None

    def add_columns_(self, grad_x: Tensor, grad_columns: Tensor) -> None:
        """Add the gradient of `columns(x)` to that of x."""
        sampling = choose_sampling(grad_x, self.sampled, self.partition, self.cfg)
        add_window_columns_(grad_x, grad_columns, self.sampled, sampling)
