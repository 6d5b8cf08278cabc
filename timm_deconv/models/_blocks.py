"""Convolution, batch norm and activation in the two orders that the families need.

Made of plain `nn.Conv2d`, `nn.BatchNorm2d` and `nn.ReLU` modules, and right also when the norms become `nn.Identity`: a
tensor that a second branch may read is never written to.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from timm_deconv.errors import InputError


def check_counts(arguments: Mapping[str, Any]) -> None:
    """Raise InputError where `num_classes` or `in_chans` is given and is no number of classes or channels."""
    for name, least in (("num_classes", 0), ("in_chans", 1)):
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name}={value!r}: it is a whole number, {least} at least")


def scaled(channels: int, width: float, divisor: int = 4) -> int:
    """`channels` times `width`, to the nearest positive multiple of `divisor`; `channels` itself at width 1."""
    if not isinstance(width, int | float) or not 0 < width < math.inf:
        raise InputError(f"width={width!r}: it multiplies every channel count and must be positive, e.g. 0.5")
    return channels if width == 1 else max(divisor, round(channels * width / divisor) * divisor)


class NormAct(nn.Module):
    """Batch norm and ReLU before a convolution, (N, C, H, W) -> the same; never in place, as others read the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate."""
        return self.act(self.norm(x))


class ConvNormAct(nn.Module):
    """Convolution that keeps the size (divided by `stride`), batch norm, and ReLU unless `act=False`.

    (N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        dilation: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias)
        self.norm = nn.BatchNorm2d(out_chs)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        return self.act(self.norm(self.conv(x)))
