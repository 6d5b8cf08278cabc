"""PNASNet: timm's, and one for 32x32 images in its small form A.

Liu et al., Progressive Neural Architecture Search, ECCV 2018, as in Table 1 of Ye et al., Network Deconvolution, ICLR
2020: every cell adds a 7x7 depthwise convolution and a 3x3 max pool.
"""

from typing import Any

from torch import Tensor, nn

from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family
from .staged_net import ConvNormAct, StagedNet, scaled

__all__ = ["CellA", "CifarPNASNet"]


class CellA(nn.Module):
    """ReLU of a 7x7 depthwise convolution plus a 3x3 max pool, which a 1x1 convolution follows at stride 2.

    `out_chs` is a multiple of `in_chs`, and equals it at stride 1.
    """

    def __init__(self, in_chs: int, out_chs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.separable = ConvNormAct(in_chs, out_chs, 7, stride=stride, groups=in_chs, act=False)
        self.pool = nn.MaxPool2d(3, stride, 1)
        self.project = ConvNormAct(in_chs, out_chs, 1, act=False) if stride > 1 else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches, activate: (N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        return self.act(self.separable(x) + self.project(self.pool(x)))


class CifarPNASNet(StagedNet):
    """Three stages of `cells` cells; a cell of stride 2 that doubles the channels precedes the second and the third.

    Args:
        cells: how many a stage has, without the one of stride 2.
        planes: channels of the stem and the first stage.
        width: multiplies every channel count.
        in_chans, head: as of `StagedNet`.
    """

    def __init__(self, cells: int, planes: int, *, width: float = 1.0, in_chans: int = 3, **head: Any) -> None:
        chs = scaled(planes, width)
        stages: list[list[nn.Module]] = []
        for stage in range(3):
            out_chs = chs * 2**stage
            down: list[nn.Module] = [CellA(out_chs // 2, out_chs, stride=2)] if stage else []
            stages.append(down + [CellA(out_chs, out_chs) for _ in range(cells)])
        levels = [(chs, 1), *((chs * 2**stage, 2**stage) for stage in range(3))]
        super().__init__(ConvNormAct(in_chans, chs), stages, levels, in_chans=in_chans, **head)


register_family(
    __name__,
    CifarPNASNet,
    {"pnasnet_a_cifar": {"cells": 6, "planes": 44}},
    frozen_stem(CIFAR_POLICY, 10),
    cfg=cifar_cfg(first_conv="stem.conv", pool_size=(8, 8), paper_ids="arXiv:1712.00559"),
    feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
    in_place=True,
)

register_deconv(
    __name__,
    ("pnasnet5large",),
    frozen_stem(IMAGENET_POLICY, 10),
    feature_cfg={"feature_cls": "hook", "no_rewrite": True},
)
