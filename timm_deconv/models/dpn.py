"""Dual Path Network for 32x32 images.

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

    (N, in_chs, H, W) -> (N, in_chs + dense_chs, H, W); the first block of a stage (`project`) sends its input through a
    1x1 convolution to `res_chs + dense_chs` channels and the block's stride before that.
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
        """Add the residual path, append the dense path."""
        out = self.conv3(self.conv2(self.conv1(x)))
        x = self.shortcut(x)
        residual = x[:, : self.res_chs] + out[:, : self.res_chs]
        return self.act(torch.cat([residual, x[:, self.res_chs :], out[:, self.res_chs :]], 1))


class CifarDPN(StagedNet):
    """Stages of `DualPathBlock`.

    Args:
        layers: blocks in each stage.
        mid_channels, res_channels, dense_channels: of each stage's blocks: bottleneck, residual path, dense path.
        strides: of each stage.
        groups: of the 3x3 convolutions.
        stem_chs, stem_stride: of the stem's 3x3 convolution.
        width: multiplies every channel count.
        in_chans: channels of the image.
        head: `num_classes`, `global_pool`, `drop_rate` as in timm.
    """

    def __init__(
        self,
        layers: Sequence[int],
        mid_channels: Sequence[int],
        res_channels: Sequence[int],
        dense_channels: Sequence[int],
        *,
        strides: Sequence[int] = (1, 2, 2, 2),
        groups: int = 32,
        stem_chs: int = 64,
        stem_stride: int = 1,
        width: float = 1.0,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        chs, reduction = scaled(stem_chs, width), stem_stride
        stem = ConvNormAct(in_chans, chs, stride=stem_stride)
        levels = [(chs, reduction)]
        stages: list[list[nn.Module]] = []
        paths = zip(layers, mid_channels, res_channels, dense_channels, strides, strict=True)
        for depth, mid, res, dense, stage_stride in paths:
            mid, res, dense = scaled(mid, width, groups), scaled(res, width), scaled(dense, width)
            blocks: list[nn.Module] = []
            for i in range(depth):
                stride = 1 if i else stage_stride
                blocks.append(DualPathBlock(chs, mid, res, dense, groups=groups, stride=stride, project=i == 0))
                chs = chs + dense if i else res + 2 * dense
            stages.append(blocks)
            reduction *= stage_stride
            levels.append((chs, reduction))
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
