"""What a 32x32 classifier is made of: `StagedNet`, and convolution, batch norm and activation in the two usual orders.

A family's module holds its blocks and builds the parts; `StagedNet` runs them and is what timm asks of a model. Every
network is the batch-norm form, with PyTorch's default initialisation, as published. `ConvNormAct` and `NormAct` stay
right when conversion turns their norms into `nn.Identity`: they never write to a tensor that a second branch may read.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_deconv.errors import InputError

__all__ = ["ConvNormAct", "NormAct", "StagedNet", "scaled"]

Level = tuple[int, int]
"""Channels and reduction (input size over map size) of a feature map."""


def scaled(channels: int, width: float, divisor: int = 4) -> int:
    """Return `channels` times `width`, rounded to a positive multiple of `divisor`; at width 1 `channels` itself.

    Raises:
        InputError: `width` is no positive number.
    """
    if not isinstance(width, int | float) or not 0 < width < math.inf:
        raise InputError(f"width={width!r}: it multiplies every channel count and must be positive, e.g. 0.5")
    return channels if width == 1 else max(divisor, round(channels * width / divisor) * divisor)


class NormAct(nn.Module):
    """Batch norm and ReLU in front of a convolution; neither in place, as others may read the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate: (N, C, H, W) -> (N, C, H, W)."""
        return self.act(self.norm(x))


class ConvNormAct(nn.Module):
    """Convolution, batch norm and ReLU.

    Args:
        in_chs, out_chs: channels.
        kernel_size: an odd number; padding keeps the size, which `stride` divides.
        stride, groups, bias, dilation: as of `nn.Conv2d`.
        act: whether ReLU follows; it writes in place.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        dilation: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias)
        self.norm = nn.BatchNorm2d(out_chs)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate: (N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        return self.act(self.norm(self.conv(x)))


class StagedNet(nn.Module):
    """A classifier in timm's form: `stem`, `stages` (each a sequence of blocks), `final`, `head`.

    Its feature levels are the outputs of the stem and of each stage.

    Args:
        stem: (N, in_chans, H, W) -> (N, C0, H0, W0); a `nn.Sequential` counts as one level.
        stages: the blocks of each stage.
        levels: channels and reduction of the stem's output and of each stage's.
        final: layers between the last stage and the pooling, none if None.
        num_features: channels after `final`; those of the last level if None.
        in_chans, num_classes, global_pool, drop_rate: as in timm.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[Iterable[nn.Module]],
        levels: Sequence[Level],
        *,
        final: nn.Module | None = None,
        num_features: int | None = None,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.final = nn.Identity() if final is None else final
        names = [f"stem.{len(stem) - 1}" if isinstance(stem, nn.Sequential) else "stem"]
        names += [f"stages.{i}" for i in range(len(self.stages))]
        self.feature_info = [
            {"num_chs": chs, "reduction": reduction, "module": name}
            for (chs, reduction), name in zip(levels, names, strict=True)
        ]
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.grad_checkpointing = False
        self.num_features = num_features or levels[-1][0]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter groups from input to output: by stage if `coarse`, else by block."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^final", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear layer; `nn.Identity` at `num_classes=0`."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new linear layer, and a new pooling if one is named; with 0 classes pooled features come out."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the maps of some feature levels.

        Args:
            x: (N, in_chans, H, W).
            indices: which levels; an int for the last so many, None for all.
            norm: apply the final norm and activation, where the family has them, to the last level.
            stop_early: skip what comes after the highest level asked for.
            output_fmt: 'NCHW', the only one.
            intermediates_only: return the list alone.

        Returns:
            (output of `forward_features`, list of maps), or the list. A map is (N, num_chs, H / reduction,
            W / reduction), as `feature_info` says.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: feature maps come as 'NCHW'")
        count = len(self.stages)
        take, last = feature_take_indices(count + 1, indices)
        x = self.stem(x)
        maps = [x] if 0 in take else []
        for level, stage in enumerate(self.stages[:last] if stop_early else self.stages, 1):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if level in take:
                with_norm = norm and level == count and isinstance(self.final, NormAct)
                maps.append(self.final(x) if with_norm else x)
        if intermediates_only:
            return maps
        return (x if stop_early and last < count else self.final(x)), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what is behind the highest of the feature levels `indices`, and return them as absolute indices."""
        count = len(self.stages)
        take, last = feature_take_indices(count + 1, indices)
        self.stages = self.stages[:last]
        if prune_norm or last < count:
            self.final = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < count:
            self.num_classes = 0
            self.head = ClassifierHead(self.num_features, 0, pool_type="", drop_rate=self.head.drop.p)
            self.head_hidden_size = self.num_features
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map, unpooled: (N, in_chans, H, W) -> (N, num_features, H', W')."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify: (N, num_features, H', W') -> (N, num_classes); (N, head_hidden_size) if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images: (N, in_chans, H, W) -> (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
