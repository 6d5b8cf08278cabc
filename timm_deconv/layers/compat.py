"""The published class and argument names, for projects that carry a copy of the published `deconv.py`: change one
import.

    from .compat import FastDeconv, Delinear, ChannelDeconv

State dicts are the published ones; without the freeze counter, which those lack, they count as those of many batches.
"""

from . import channel, conv, linear
from .config import DeconvCfg

__all__ = ["ChannelDeconv", "Delinear", "FastDeconv"]

Pair = int | tuple[int, int]


class FastDeconv(conv.Deconv2d):
    """`Deconv2d` with the published signature. An `activation` is refused: put it behind the layer."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float = 0.1,
        block: int = 64,
        sampling_stride: int = 3,
        freeze: bool = False,
        freeze_iter: int = 100,
    ) -> None:
        cfg = DeconvCfg(
            eps=eps,
            n_iter=n_iter,
            momentum=momentum,
            block=block,
            sampling_stride=sampling_stride,
            freeze=freeze,
            freeze_iter=freeze_iter,
        )
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, cfg=cfg)


class Delinear(linear.DeconvLinear):
    """`DeconvLinear` with the published signature."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float = 0.1,
        block: int = 512,
    ) -> None:
        cfg = DeconvCfg(eps=eps, n_iter=n_iter, momentum=momentum, block=block)
        super().__init__(in_features, out_features, bias, cfg=cfg)


class ChannelDeconv(channel.ChannelDeconv):
    """`ChannelDeconv` with the published signature; the number of channels is taken from each input."""

    def __init__(
        self, block: int, eps: float = 1e-2, n_iter: int = 5, momentum: float = 0.1, sampling_stride: int = 3
    ) -> None:
        cfg = DeconvCfg(block=block, eps=eps, n_iter=n_iter, momentum=momentum, sampling_stride=sampling_stride)
        super().__init__(cfg=cfg)
