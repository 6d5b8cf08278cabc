"""Pre-activation ResNet: timm's, and one for 32x32 images.

He et al., Identity Mappings in Deep Residual Networks, ECCV 2016, as in Table 1 of Ye et al., Network Deconvolution,
ICLR 2020: the shortcut of a block that changes the shape starts behind the first activation, and the network ends
without norm and activation. The published network also registers a norm that it never uses; this one does not.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import SEModule
from torch import Tensor, nn

from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family
from .staged_net import ConvNormAct, NormAct, StagedNet, scaled

__all__ = ["CifarPreActResNet", "PreActBlock"]


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each behind norm and ReLU, and a shortcut.

    Args:
        in_chs, out_chs: channels.
        stride: of the first convolution, and of the shortcut.
        se_reduction: channels over hidden channels of a squeeze-excite module that ends the branch; None: no module.
    """

    def __init__(self, in_chs: int, out_chs: int, *, stride: int = 1, se_reduction: int | None = None) -> None:
        super().__init__()
        self.preact1 = NormAct(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.preact2 = NormAct(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        changes = stride != 1 or in_chs != out_chs
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if changes else None
        hidden = max(1, out_chs // se_reduction) if se_reduction else 0
        self.se = SEModule(out_chs, rd_channels=hidden) if hidden else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add branch and shortcut: (N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        active = self.preact1(x)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.se(self.conv2(self.preact2(self.conv1(active)))) + shortcut


class CifarPreActResNet(StagedNet):
    """Stages of `PreActBlock`; each after the first has stride 2.

    Args:
        layers: blocks in each stage.
        channels: output channels of each stage; the stem has those of the first.
        norm_stem: whether norm and ReLU follow the stem's convolution.
        se_reduction: as of `PreActBlock`.
        width: multiplies every channel count.
        in_chans, head: as of `StagedNet`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        norm_stem: bool = False,
        se_reduction: int | None = None,
        width: float = 1.0,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        prev = scaled(channels[0], width)
        conv = nn.Conv2d(in_chans, prev, 3, padding=1, bias=False)
        stem = ConvNormAct(in_chans, prev) if norm_stem else conv
        levels = [(prev, 1)]
        stages: list[list[nn.Module]] = []
        for i, (depth, stage_chs) in enumerate(zip(layers, channels, strict=True)):
            chs = scaled(stage_chs, width)
            first = PreActBlock(prev, chs, stride=2 if i else 1, se_reduction=se_reduction)
            stages.append([first, *(PreActBlock(chs, chs, se_reduction=se_reduction) for _ in range(depth - 1))])
            levels.append((chs, 2**i))
            prev = chs
        super().__init__(stem, stages, levels, in_chans=in_chans, **head)


register_family(
    __name__,
    CifarPreActResNet,
    {"preact_resnet18_cifar": {"layers": (2, 2, 2, 2)}},
    frozen_stem(CIFAR_POLICY, 10),
    cfg=cifar_cfg(first_conv="stem", paper_ids="arXiv:1603.05027"),
    in_place=True,
)

register_deconv(__name__, ("resnetv2_50",), frozen_stem(IMAGENET_POLICY, 10), feature_cfg={"flatten_sequential": True})
