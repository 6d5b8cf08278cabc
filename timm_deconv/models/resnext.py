"""ResNeXt-29 for 32x32 images: three stages of timm's grouped bottlenecks behind a 1x1 stem.

Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017, as in Table 1 of Ye et al., Network
Deconvolution, ICLR 2020.
"""

from collections.abc import Sequence
from typing import Any

from timm.models.resnet import Bottleneck, make_blocks

from timm_deconv.convert import DeconvPolicy

from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family
from .staged_net import ConvNormAct, StagedNet, scaled

__all__ = ["CifarResNeXt"]


class CifarResNeXt(StagedNet):
    """Stages of timm's `Bottleneck` with grouped 3x3 convolutions; each stage after the first has stride 2.

    Args:
        layers: blocks in each stage.
        channels: base channels of each stage, a quarter of its output's; the stem has those of the first.
        cardinality: groups of the 3x3 convolutions.
        base_width: channels of a group in a stage of 64 base channels.
        width: multiplies every channel count.
        in_chans, head: as of `StagedNet`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        channels: Sequence[int] = (64, 128, 256),
        cardinality: int = 32,
        base_width: int = 4,
        width: float = 1.0,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        planes = tuple(scaled(c, width, 64 // base_width) for c in channels)
        chs = scaled(channels[0], width)
        stages, infos = make_blocks(
            (Bottleneck,) * len(planes), planes, tuple(layers), chs, cardinality=cardinality, base_width=base_width
        )
        levels = [(chs, 1), *((i["num_chs"], i["reduction"] // 4) for i in infos)]  # timm counts from its stem's 4
        stem = ConvNormAct(in_chans, chs, 1)
        super().__init__(stem, [stage for _, stage in stages], levels, in_chans=in_chans, **head)


GROUPED = DeconvPolicy(roles={"grouped": {"n_iter": 3}})
"""Published: fewer steps in the grouped 3x3 convolutions."""

register_family(
    __name__,
    CifarResNeXt,
    {"resnext29_32x4d_cifar": {"layers": (3, 3, 3)}},
    GROUPED.over(frozen_stem(CIFAR_POLICY, 10)),
    cfg=cifar_cfg(first_conv="stem.conv", pool_size=(8, 8), paper_ids="arXiv:1611.05431"),
    feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
    in_place=True,
)

register_deconv(
    __name__,
    ("resnext50_32x4d", "resnext101_32x8d"),
    GROUPED.over(frozen_stem(IMAGENET_POLICY, 15)),
    in_place=True,
)
