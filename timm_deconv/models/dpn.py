"""Dual Path Network: timm's, and one for 32x32 images.

Chen et al., Dual Path Networks, NeurIPS 2017, as in Table 1 of Ye et al., Network Deconvolution, ICLR 2020: one tensor
holds both paths, the residual channels in front, and norm and ReLU follow the convolutions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family
from .staged_net import ConvNormAct, StagedNet, scaled

__all__ = ["CifarDPN", "DualPathBlock"]


class DualPathBlock(nn.Module):
    """Bottleneck whose first `res_chs` output channels are added to the input's, the other `dense_chs` appended.

    Args:
        in_chs: channels of the input.
        mid_chs: channels of the 3x3 convolution.
        res_chs, dense_chs: channels of the two paths that the block computes.
        groups, stride: of the 3x3 convolution.
        project: whether a 1x1 convolution of the same stride first takes the input to `res_chs + dense_chs` channels,
            as in the first block of a stage.
    """

    def __init__(
        self, in_chs: int, mid_chs: int, res_chs: int, dense_chs: int, *, groups: int, stride: int, project: bool
    ) -> None:
        super().__init__()
        out_chs = res_chs + dense_chs
        self.res_chs = res_chs
        self.shortcut = ConvNormAct(in_chs, out_chs, 1, stride=stride, act=False) if project else nn.Identity()
        self.conv1 = ConvNormAct(in_chs, mid_chs, 1)
        self.conv2 = ConvNormAct(mid_chs, mid_chs, 3, stride=stride, groups=groups)
        self.conv3 = ConvNormAct(mid_chs, out_chs, 1, act=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual path, append the dense path.

        (N, C, H, W) -> (N, chs + dense_chs, ceil(H / stride), ceil(W / stride)), where chs is `in_chs`, or
        `res_chs + dense_chs` behind a projection.
        """
        out = self.conv3(self.conv2(self.conv1(x)))
        x = self.shortcut(x)
        residual = x[:, : self.res_chs] + out[:, : self.res_chs]
        return self.act(torch.cat([residual, x[:, self.res_chs :], out[:, self.res_chs :]], 1))


class CifarDPN(StagedNet):
    """Stages of `DualPathBlock` behind a stem of 64 channels; each after the first has stride 2.

    Args:
        layers: blocks in each stage.
        mid_channels, res_channels, dense_channels: of each stage's blocks, as of `DualPathBlock`.
        groups: of the 3x3 convolutions.
        width: multiplies every channel count.
        in_chans, head: as of `StagedNet`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        mid_channels: Sequence[int],
        res_channels: Sequence[int],
        dense_channels: Sequence[int],
        *,
        groups: int = 32,
        width: float = 1.0,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        chs = scaled(64, width)
        stem = ConvNormAct(in_chans, chs)
        levels = [(chs, 1)]
        stages: list[list[nn.Module]] = []
        paths = zip(layers, mid_channels, res_channels, dense_channels, strict=True)
        for i, (depth, mid, res, dense) in enumerate(paths):
            mid, res, dense = scaled(mid, width, groups), scaled(res, width), scaled(dense, width)
            blocks: list[nn.Module] = []
            for first in [True] + [False] * (depth - 1):
                stride = 2 if first and i else 1
                blocks.append(DualPathBlock(chs, mid, res, dense, groups=groups, stride=stride, project=first))
                chs = res + 2 * dense if first else chs + dense
            stages.append(blocks)
            levels.append((chs, 2**i))
        super().__init__(stem, stages, levels, in_chans=in_chans, **head)


register_family(
    __name__,
    CifarDPN,
    {
        "dpn92_cifar": {
            "layers": (3, 4, 20, 3),
            "mid_channels": (96, 192, 384, 768),
            "res_channels": (256, 512, 1024, 2048),
            "dense_channels": (16, 32, 24, 128),
        }
    },
    frozen_stem(CIFAR_POLICY, 10),
    cfg=cifar_cfg(first_conv="stem.conv", paper_ids="arXiv:1707.01629"),
    in_place=True,
)

register_deconv(
    __name__,
    ("dpn68", "dpn92", "dpn98"),
    frozen_stem(IMAGENET_POLICY, 10),
    feature_cfg={"flatten_sequential": True},
)
