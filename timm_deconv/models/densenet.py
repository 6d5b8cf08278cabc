"""DenseNet-BC for 32x32 images.

Huang et al., Densely Connected Convolutional Networks, CVPR 2017, with the depths and the growth rate of the ImageNet
network, as in Table 1 of Ye et al., Network Deconvolution, ICLR 2020. Unlike timm's it has no norm behind the stem.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._blocks import NormAct, scaled
from ._cifar import StagedNet
from ._registration import CIFAR_POLICY, IMAGENET_POLICY, frozen_stem, register_deconv
from ._twins import STAGED_FEATURES, register_twins

__all__ = ["CifarDenseNet", "DenseLayer", "Transition"]


class DenseLayer(nn.Module):
    """1x1 and 3x3 convolution behind norm and ReLU: (N, C, H, W) -> (N, C + growth, H, W), the input in front."""

    def __init__(self, in_chs: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.preact1 = NormAct(in_chs)
        self.conv1 = nn.Conv2d(in_chs, bottleneck, 1, bias=False)
        self.preact2 = NormAct(bottleneck)
        self.conv2 = nn.Conv2d(bottleneck, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Append `growth` new channels."""
        return torch.cat([x, self.conv2(self.preact2(self.conv1(self.preact1(x))))], 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution and 2x2 average: (N, in_chs, H, W) -> (N, out_chs, H // 2, W // 2)."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.preact = NormAct(in_chs)
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Fewer channels at half the size."""
        return self.pool(self.conv(self.preact(x)))


class CifarDenseNet(StagedNet):
    """Dense blocks with transitions, which halve the channels, in front of all but the first.

    Args:
        layers: dense layers in each stage.
        growth: channels that a layer adds; the stem has twice as many, the 1x1 convolutions four times as many.
        stem_stride: of the stem's 3x3 convolution.
        width: multiplies the growth.
        in_chans: channels of the image.
        head: `num_classes`, `global_pool`, `drop_rate` as in timm.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        growth: int = 32,
        stem_stride: int = 1,
        width: float = 1.0,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        growth = scaled(growth, width)
        chs, reduction = 2 * growth, stem_stride
        levels = [(chs, reduction)]
        stages: list[list[nn.Module]] = []
        for depth in layers:
            blocks: list[nn.Module] = []
            if stages:
                blocks.append(Transition(chs, chs // 2))
                chs, reduction = chs // 2, 2 * reduction
            for _ in range(depth):
                blocks.append(DenseLayer(chs, growth, 4 * growth))
                chs += growth
            stages.append(blocks)
            levels.append((chs, reduction))
        stem = nn.Conv2d(in_chans, 2 * growth, 3, stem_stride, 1, bias=False)
        super().__init__(stem, stages, levels, final=NormAct(chs), in_chans=in_chans, **head)


register_twins(
    __name__,
    CifarDenseNet,
    {"densenet121_cifar": {"layers": (6, 12, 24, 16)}},
    first_conv="stem",
    paper_ids="arXiv:1608.06993",
)

register_deconv(__name__, {"densenet121_cifar": CIFAR_POLICY}, feature_cfg=STAGED_FEATURES, in_place=True)
register_deconv(
    __name__,
    dict.fromkeys(("densenet121", "densenet161", "densenet169", "densenet201"), frozen_stem(IMAGENET_POLICY, 15)),
    feature_cfg={"flatten_sequential": True},
)
