"""MobileNetV2: timm's, and one for 32x32 images.

Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, as in Table 1 of Ye et al., Network
Deconvolution, ICLR 2020: stride 1 in the stem and in the second group of blocks, ReLU, an expansion convolution in the
first block too, and a convolved shortcut where a block of stride 1 changes the channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import SEModule
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, nn

from timm_deconv.convert import DeconvPolicy

from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family
from .staged_net import ConvNormAct, StagedNet, scaled

__all__ = ["INVERTED_FEATURES", "CifarMobileNetV2", "InvertedResidual", "inverted_residual_policy"]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 projection; at stride 1 with a shortcut.

    Args:
        in_chs, out_chs: channels; where they differ, the shortcut is a 1x1 convolution and norm.
        expansion: channels of the depthwise convolution over `in_chs`.
        stride: of the depthwise convolution.
        se_reduction: `out_chs` over hidden channels of a squeeze-excite module that scales the projection; None: none.
    """

    def __init__(
        self, in_chs: int, out_chs: int, expansion: int, *, stride: int = 1, se_reduction: int | None = None
    ) -> None:
        super().__init__()
        mid_chs = in_chs * expansion
        self.expand = ConvNormAct(in_chs, mid_chs, 1)
        self.depthwise = ConvNormAct(mid_chs, mid_chs, 3, stride=stride, groups=mid_chs)
        self.project = ConvNormAct(mid_chs, out_chs, 1, act=False)
        self.residual = stride == 1
        changes = self.residual and in_chs != out_chs
        self.shortcut = ConvNormAct(in_chs, out_chs, 1, act=False) if changes else nn.Identity()
        hidden = max(1, out_chs // se_reduction) if se_reduction else 0
        self.se = SEModule(out_chs, rd_channels=hidden) if hidden else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add branch and shortcut: (N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        out = self.se(self.project(self.depthwise(self.expand(x))))
        return out + self.shortcut(x) if self.residual else out


class CifarMobileNetV2(StagedNet):
    """Inverted residuals behind a stem of 32 channels; a stage is what lies between two halvings of the map.

    Args:
        groups: (expansion, channels, blocks, stride of the first) of each group of equal blocks.
        head_chs: channels of the 1x1 convolution behind the last block; None: no such convolution.
        se_reduction: as of `InvertedResidual`.
        width: multiplies every channel count.
        in_chans, head: as of `StagedNet`.
    """

    def __init__(
        self,
        groups: Sequence[tuple[int, int, int, int]],
        *,
        head_chs: int | None = 1280,
        se_reduction: int | None = None,
        width: float = 1.0,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        chs, reduction = scaled(32, width), 1
        stem = ConvNormAct(in_chans, chs)
        levels = [(chs, reduction)]
        stages: list[list[nn.Module]] = []
        for expansion, group_chs, depth, group_stride in groups:
            out_chs = scaled(group_chs, width)
            for stride in [group_stride] + [1] * (depth - 1):
                if stride > 1 or not stages:
                    reduction *= stride
                    stages.append([])
                    levels.append((out_chs, reduction))
                stages[-1].append(InvertedResidual(chs, out_chs, expansion, stride=stride, se_reduction=se_reduction))
                levels[-1] = (out_chs, reduction)
                chs = out_chs
        final_chs = scaled(head_chs, width) if head_chs else chs
        final = ConvNormAct(chs, final_chs, 1) if head_chs else None
        super().__init__(stem, stages, levels, final=final, num_features=final_chs, in_chans=in_chans, **head)


PROJECTIONS: dict[type[nn.Module], str] = {
    InvertedResidual: "project.conv",
    timm_blocks.InvertedResidual: "conv_pwl",
    timm_blocks.EdgeResidual: "conv_pwl",
    timm_blocks.DepthwiseSeparableConv: "conv_pw",
}
"""Where the projection stands in each kind of block, the 32x32 one and timm's."""

INVERTED_FEATURES = {"feature_cls": "getter", "out_indices": (0, 1, 2, 3, 4)}
"""How timm's EfficientNet, which MobileNetV2 is too, gives the feature maps of a converted network."""


def inverted_residual_policy(base: DeconvPolicy) -> Callable[[nn.Module], DeconvPolicy]:
    """Add the published exceptions of inverted residuals to a policy.

    Depthwise convolutions take one step. So do projections, in blocks of as many channels as enter the residual block.

    Returns:
        (batch-norm network) -> its policy.
    """

    def policy(model: nn.Module) -> DeconvPolicy:
        projections = {
            f"{name}.{PROJECTIONS[type(block)]}": {"block": _first_conv(block).in_channels, "n_iter": 1}
            for name, block in model.named_modules()
            if type(block) in PROJECTIONS
        }
        return DeconvPolicy(roles={"depthwise": {"n_iter": 1}}, patterns=projections).over(base)

    return policy


def _first_conv(block: nn.Module) -> nn.Conv2d:
    return next(module for module in block.modules() if isinstance(module, nn.Conv2d))


register_family(
    __name__,
    CifarMobileNetV2,
    {
        "mobilenetv2_cifar": {
            "groups": (
                (1, 16, 1, 1),
                (6, 24, 2, 1),
                (6, 32, 3, 2),
                (6, 64, 4, 2),
                (6, 96, 3, 1),
                (6, 160, 3, 2),
                (6, 320, 1, 1),
            )
        }
    },
    inverted_residual_policy(frozen_stem(CIFAR_POLICY, 10)),
    cfg=cifar_cfg(first_conv="stem.conv", paper_ids="arXiv:1801.04381"),
    in_place=True,
)

register_deconv(
    __name__,
    ("mobilenetv2_050", "mobilenetv2_100", "mobilenetv2_140"),
    inverted_residual_policy(frozen_stem(IMAGENET_POLICY, 10)),
    feature_cfg=INVERTED_FEATURES,
    in_place=True,
)
