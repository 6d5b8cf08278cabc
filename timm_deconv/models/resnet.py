"""ResNet: timm's networks, and for 32x32 images timm's class behind a 3x3 stem without max pooling.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016, with the widths of the ImageNet networks, as in
Table 1 of Ye et al., Network Deconvolution, ICLR 2020. `resnet18_025_cifar` has a quarter of the channels: 0.7 million
parameters, of which a package can bring the weights along.
"""

from collections.abc import Sequence
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family
from .staged_net import scaled

__all__ = ["CifarResNet"]


class CifarResNet(ResNet):
    """timm's `ResNet` with one 3x3 convolution as its stem and no stem pooling.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: blocks in each of the four stages.
        channels: base channels of each stage; the stem has those of the first.
        width: multiplies every channel count, e.g. 0.25 for stages of 16, 32, 64 and 128.
        in_chans: channels of the image.
        output_stride: at most this reduction; later strides become dilations.
        kwargs: as for timm's `ResNet`: `num_classes`, `global_pool`, `drop_rate`, `drop_path_rate` and others.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        width: float = 1.0,
        in_chans: int = 3,
        output_stride: int = 8,
        **kwargs: Any,
    ) -> None:
        planes = tuple(scaled(c, width) for c in channels)
        # timm takes the stem's width only with a deep stem, which is replaced below, and counts reductions from 4.
        super().__init__(
            block,
            tuple(layers),
            in_chans=in_chans,
            channels=planes,
            stem_type="deep",
            stem_width=planes[0] // 2,
            output_stride=4 * output_stride,
            **{"num_classes": 10, **kwargs},
        )
        self.conv1 = nn.Conv2d(in_chans, planes[0], 3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Keep PyTorch's default initialisation: the published 32x32 networks use it."""


register_family(
    __name__,
    CifarResNet,
    {
        "resnet18_cifar": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
        "resnet50_cifar": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
        "resnet18_025_cifar": {"block": BasicBlock, "layers": (2, 2, 2, 2), "width": 0.25},
    },
    CIFAR_POLICY,
    cfg=cifar_cfg(first_conv="conv1", classifier="fc", paper_ids="arXiv:1512.03385"),
    feature_cfg={},
    in_place=True,
)

register_deconv(
    __name__,
    ("resnet18", "resnet34", "resnet50", "resnet101"),
    frozen_stem(IMAGENET_POLICY, 15),
    in_place=True,
)
