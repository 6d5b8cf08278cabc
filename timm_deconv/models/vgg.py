"""VGG with batch norm for 32x32 images: five stages of 3x3 convolutions and one linear layer.

Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, without the
hidden linear layers, as in Table 1 of Ye et al., Network Deconvolution, ICLR 2020. The convolutions have biases.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from timm_deconv.convert import DeconvPolicy
from timm_deconv.layers.presets import LINEAR_AS_CONV

from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family
from .staged_net import ConvNormAct, StagedNet, scaled

__all__ = ["CifarVGG"]


class CifarVGG(StagedNet):
    """VGG without hidden linear layers; each stage after the first begins with a max pool, and one comes last.

    Args:
        depths: convolutions in each stage.
        channels: output channels of each stage.
        width: multiplies every channel count.
        in_chans, head: as of `StagedNet`.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        channels: Sequence[int] = (64, 128, 256, 512, 512),
        width: float = 1.0,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        chs = [scaled(c, width) for c in channels]
        stages: list[list[nn.Module]] = []
        prev = in_chans
        for depth, out_chs in zip(depths, chs, strict=True):
            pool: list[nn.Module] = [nn.MaxPool2d(2)] if stages else []
            stages.append(pool + [ConvNormAct(out_chs if i else prev, out_chs, bias=True) for i in range(depth)])
            prev = out_chs
        levels = [(c, 2**i) for i, c in enumerate(chs)]
        stem = nn.Sequential(*stages[0])
        super().__init__(stem, stages[1:], levels, final=nn.MaxPool2d(2), in_chans=in_chans, **head)


register_family(
    __name__,
    CifarVGG,
    {
        "vgg11_cifar": {"depths": (1, 1, 2, 2, 2)},
        "vgg13_cifar": {"depths": (2, 2, 2, 2, 2)},
        "vgg16_cifar": {"depths": (2, 2, 3, 3, 3)},
        "vgg19_cifar": {"depths": (2, 2, 4, 4, 4)},
    },
    frozen_stem(CIFAR_POLICY, 15),
    cfg=cifar_cfg(first_conv="stem.0.conv", pool_size=(1, 1), paper_ids="arXiv:1409.1556"),
    in_place=True,
)

HIDDEN = {"pre_logits.fc*": LINEAR_AS_CONV}
"""timm holds the two hidden linear layers as convolutions; they are whitened as the published linear layers are."""

register_deconv(
    __name__,
    ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    DeconvPolicy(patterns=HIDDEN).over(frozen_stem(IMAGENET_POLICY, 15)),
    feature_cfg={"flatten_sequential": True},
    in_place=True,
)
