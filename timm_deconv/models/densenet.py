"""DenseNet: timm's, and one with bottlenecks and compression (BC) for 32x32 images.

Huang et al., Densely Connected Convolutional Networks, CVPR 2017, with the depths and the growth rate of the ImageNet
network, as in Table 1 of Ye et al., Network Deconvolution, ICLR 2020. Unlike timm's, the latter has no norm behind the
stem, and the channels that a layer adds stand in front of its input's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError

from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family
from .staged_net import NormAct, StagedNet, scaled

__all__ = ["CifarDenseNet", "DenseLayer", "Transition"]


class DenseLayer(nn.Module):
    """1x1 and 3x3 convolution, each behind norm and ReLU, which add channels to the input's.

    Args:
        in_chs: channels of the input.
        growth: channels that are added.
        bottleneck: channels between the two convolutions.
        new_in_front: whether the new channels stand before those of the input, as published, or behind them. It decides
            which channels share an interleaved block of a whitening layer, and which weight is a channel's.
    """

    def __init__(self, in_chs: int, growth: int, bottleneck: int, *, new_in_front: bool = True) -> None:
        super().__init__()
        self.preact1 = NormAct(in_chs)
        self.conv1 = nn.Conv2d(in_chs, bottleneck, 1, bias=False)
        self.preact2 = NormAct(bottleneck)
        self.conv2 = nn.Conv2d(bottleneck, growth, 3, 1, 1, bias=False)
        self.new_in_front = new_in_front

    def forward(self, x: Tensor) -> Tensor:
        """Add `growth` channels to those of the input: (N, in_chs, H, W) -> (N, growth + in_chs, H, W)."""
        new = self.conv2(self.preact2(self.conv1(self.preact1(x))))
        return torch.cat([new, x] if self.new_in_front else [x, new], 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution and 2x2 average pooling."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.preact = NormAct(in_chs)
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce channels, and halve the size: (N, in_chs, H, W) -> (N, out_chs, H // 2, W // 2)."""
        return self.pool(self.conv(self.preact(x)))


class CifarDenseNet(StagedNet):
    """Dense blocks with transitions, which halve the channels, in front of all but the first.

    Args:
        layers: dense layers in each stage.
        growth: channels that a layer adds; the stem has twice as many, the 1x1 convolutions four times as many.
        width: multiplies the growth.
        new_in_front: as in `DenseLayer`; None for True, or for what the weights were saved with. False is the order of
            version 0.1.0, whose tensors have the same names and shapes: its folders say it by not speaking of it.
        in_chans, head: as of `StagedNet`.

    Attributes:
        own_arguments: what is recorded of the network beside the arguments that it was made with.
    """

    __jit_ignored_attributes__ = ("_model_args", "own_arguments")

    def __init__(
        self,
        layers: Sequence[int],
        *,
        growth: int = 32,
        width: float = 1.0,
        new_in_front: bool | None = None,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        growth = scaled(growth, width)
        chs = 2 * growth
        levels = [(chs, 1)]
        stages: list[list[nn.Module]] = []
        for i, depth in enumerate(layers):
            blocks: list[nn.Module] = []
            if i:
                blocks.append(Transition(chs, chs // 2))
                chs = chs // 2
            for _ in range(depth):
                blocks.append(DenseLayer(chs, growth, 4 * growth))
                chs += growth
            stages.append(blocks)
            levels.append((chs, 2**i))
        stem = nn.Conv2d(in_chans, 2 * growth, 3, padding=1, bias=False)
        super().__init__(stem, stages, levels, final=NormAct(chs), in_chans=in_chans, **head)
        self._order_is_chosen = new_in_front is not None
        self._set_order(new_in_front is not False)

    def follow_saved(self, arguments: Mapping[str, Any]) -> None:
        """Take the order of channels of a saved network from its arguments, unless the user has chosen one."""
        if not self._order_is_chosen:
            self._set_order(arguments.get("new_in_front", False))

    def _set_order(self, new_in_front: bool) -> None:
        for layer in self.modules():
            if isinstance(layer, DenseLayer):
                layer.new_in_front = new_in_front
        self.own_arguments = {"new_in_front": new_in_front}
        self._model_args = {**getattr(self, "_model_args", {}), **self.own_arguments}
        self._version = 2 if new_in_front else 1  # which state dicts of torch record; those of version 0.1.0 have 1

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        if version not in (None, self._version):
            behind = version == 1
            raise InputError(
                f"these weights are of a DenseNet whose layers put new channels {'behind' if behind else 'in front'}:"
                f" create the network with new_in_front={not behind}"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


register_family(
    __name__,
    CifarDenseNet,
    {"densenet121_cifar": {"layers": (6, 12, 24, 16)}},
    CIFAR_POLICY,
    cfg=cifar_cfg(first_conv="stem", paper_ids="arXiv:1608.06993"),
    in_place=True,
)

register_deconv(
    __name__,
    ("densenet121", "densenet161", "densenet169", "densenet201"),
    frozen_stem(IMAGENET_POLICY, 15),
    feature_cfg={"flatten_sequential": True},
)
