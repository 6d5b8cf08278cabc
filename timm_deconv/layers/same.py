"""TensorFlow's 'SAME' padding: as many outputs as strides fit into the input, whatever its size.

timm keeps it for weights that come from TensorFlow. How much is padded depends on the input's size, and an odd pixel
goes to the bottom and right, so that the numbers of `nn.Conv2d` cannot say it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deconv.kernels.windows import as_pair

from .conv import Deconv2d
from .functional import Moments

__all__ = ["Conv2dSame", "Deconv2dSame", "pad_same"]


class Conv2dSame(nn.Conv2d):
    """`nn.Conv2d` that pads its input so that (N, Cin, H, W) -> (N, Cout, ceil(H / stride), ceil(W / stride))."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self._padded(input), self.weight, self.bias)

    def _padded(self, input: Tensor) -> Tensor:
        return pad_same(input, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]


class Deconv2dSame(Deconv2d):
    """`Deconv2d` that pads its input first: (N, Cin, H, W) -> (N, Cout, ceil(H / stride), ceil(W / stride)).

    The statistics see the padded windows, as the convolution does.
    """

    plain = Conv2dSame

    def forward(self, input: Tensor) -> Tensor:
        return self._whitened_conv(self._padded(input))

    @torch.jit.unused
    def moments(self, input: Tensor) -> Moments:
        """Compute mean (S, F) and covariance (S, F, F) of the layer's samples of an input (N, Cin, H, W)."""
        return super().moments(self._padded(input))

    def _padded(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return pad_same(input, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        else:
            return pad_same(input, as_pair(self.kernel_size), as_pair(self.stride), as_pair(self.dilation))


torch.fx.wrap("pad_same")  # for `Conv2dSame`, which is traced as what it does


def pad_same(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Pad (..., H, W) with zeros, the odd one at the end, so that ceil(H / stride) windows fit; likewise W.

    Args:
        x: (..., H, W).
        kernel_size, stride, dilation: rows and columns.
    """
    rows = _missing(x.shape[-2], kernel_size[0], stride[0], dilation[0])
    cols = _missing(x.shape[-1], kernel_size[1], stride[1], dilation[1])
    return F.pad(x, [cols // 2, cols - cols // 2, rows // 2, rows - rows // 2])


def _missing(size: int, kernel: int, stride: int, dilation: int) -> int:
    outputs = (size + stride - 1) // stride
    return max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
