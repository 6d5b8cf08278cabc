"""What the 32x32 classifiers share: stem, stages, last layers and head, with all that timm asks of a model.

A family's module holds its blocks and builds the parts; `StagedNet` runs them. Every network is the batch-norm form.
Weights keep PyTorch's default initialisation, as published.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ._blocks import NormAct

Level = tuple[int, int]
"""Channels and reduction (input size over map size) of a feature map."""


class StagedNet(nn.Module):
    """A classifier in timm's form: `stem`, `stages` (each a sequence of blocks), `final`, `head`.

    Feature levels are the stem's output and each stage's.

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
        """Patterns of parameter groups from input to output: by stage if `coarse`, else by block."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^final", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer; `nn.Identity` at `num_classes=0`."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear layer, and new pooling if given; 0 classes: none, pooled features come out."""
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
        """The maps at feature levels `indices` (an int: the last so many; None: all).

        Args:
            x: (N, in_chans, H, W).
            norm: apply the final norm and activation, where the family has them, to the last level.
            stop_early: skip what comes after the highest level asked for.
            output_fmt: 'NCHW', the only one.
            intermediates_only: return the list alone.

        Returns:
            (output of `forward_features`, list of maps), or the list.
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
        """Drop what is behind the highest of the feature levels `indices`; returns them as absolute indices."""
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
        """(N, in_chans, H, W) -> (N, num_features, H', W'), unpooled."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, H', W') -> (N, num_classes), or (N, head_hidden_size) if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
