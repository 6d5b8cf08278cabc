"""DeepLabV3 and FCN for dense prediction: timm's ResNet at output stride 8 or 16, a decoder and a 1x1 classifier.

Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017; Long et al., Fully Convolutional
Networks for Semantic Segmentation, CVPR 2015; in the form that Ye et al., Network Deconvolution, ICLR 2020, use.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from timm_deconv.convert import DeconvPolicy
from timm_deconv.errors import InputError

from .registration import IMAGENET_POLICY, frozen_stem, register_family
from .staged_net import ConvNormAct

__all__ = ["ASPP", "ImagePool", "SegmentationNet"]

Decoder = Literal["aspp", "fcn"]


class ImagePool(nn.Module):
    """The image's mean through a 1x1 convolution, at every position."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = ConvNormAct(in_chs, out_chs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pool, convolve, spread: (N, in_chs, H, W) -> (N, out_chs, H, W)."""
        # As bilinear enlargement of one position would.
        return self.conv(self.pool(x)).expand(-1, -1, x.shape[2], x.shape[3])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: convolutions of several dilations and an `ImagePool`, concatenated and projected.

    Args:
        in_chs: channels of the input.
        out_chs: channels of each branch and of the output.
        rates: dilations of 3x3 convolutions, beside one 1x1 convolution.
        drop_rate: dropout behind the projection.
    """

    def __init__(self, in_chs: int, out_chs: int, rates: Sequence[int], drop_rate: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvNormAct(in_chs, out_chs, 1),
                *(ConvNormAct(in_chs, out_chs, 3, dilation=rate) for rate in rates),
                ImagePool(in_chs, out_chs),
            ]
        )
        self.project = ConvNormAct(len(self.branches) * out_chs, out_chs, 1)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Run the branches, project: (N, in_chs, H, W) -> (N, out_chs, H, W)."""
        return self.drop(self.project(torch.cat([branch(x) for branch in self.branches], 1)))


def _fcn_decoder(in_chs: int, drop_rate: float) -> nn.Module:
    return nn.Sequential(ConvNormAct(in_chs, in_chs // 4, 3), nn.Dropout(drop_rate))


class SegmentationNet(nn.Module):
    """Encoder (timm's ResNet), decoder and 1x1 classifier.

    With `aux_head` and in training mode the output is (logits, auxiliary logits); in every other case one tensor. At
    `num_classes=0` it is the decoder's map, at the encoder's resolution.

    Args:
        layers: blocks in each stage of the ResNet.
        decoder: 'aspp' (DeepLabV3, 256 channels) or 'fcn' (a quarter of the encoder's channels).
        output_stride: input size over the encoder's map size, 8 or 16.
        rates: dilations of the ASPP at output stride 8; halved at 16.
        aux_head: an FCN head on the third stage, for an auxiliary loss.
        drop_rate: dropout behind the ASPP's projection or in front of the FCN's classifier.
        drop_path_rate: as in timm's ResNet.
        num_classes, in_chans: as in timm.

    Raises:
        InputError: another `output_stride`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        decoder: Decoder,
        *,
        output_stride: int = 8,
        rates: Sequence[int] = (12, 24, 36),
        aux_head: bool = False,
        drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
        num_classes: int = 21,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise InputError(f"output_stride={output_stride}: the encoder's dilations are laid out for 8 or 16")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.backbone = ResNet(
            Bottleneck,
            tuple(layers),
            num_classes=0,
            in_chans=in_chans,
            output_stride=output_stride,
            global_pool="",
            drop_path_rate=drop_path_rate,
            zero_init_last=False,
        )
        self.feature_info = [{**info, "module": f"backbone.{info['module']}"} for info in self.backbone.feature_info]
        self.num_features = self.backbone.num_features
        if decoder == "aspp":
            self.head_hidden_size = 256
            halved = [rate * 8 // output_stride for rate in rates]
            pyramid = ASPP(self.num_features, 256, halved, drop_rate)
            self.decoder: nn.Module = nn.Sequential(pyramid, ConvNormAct(256, 256, 3))
        else:
            self.head_hidden_size = self.num_features // 4
            self.decoder = _fcn_decoder(self.num_features, drop_rate)
        self.classifier = _classifier(self.head_hidden_size, num_classes)
        aux_chs = self.num_features // 2
        self.aux_decoder = _fcn_decoder(aux_chs, drop_rate=0.1) if aux_head else None
        self.aux_classifier = _classifier(aux_chs // 4, num_classes) if aux_head else None

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make new last convolutions, the auxiliary one too, none for 0 classes; there is no pooling to choose."""
        like = self.backbone.conv1.weight
        self.num_classes = num_classes
        self.classifier = _classifier(self.head_hidden_size, num_classes).to(like)
        if self.aux_decoder is not None:
            self.aux_classifier = _classifier(self.num_features // 8, num_classes).to(like)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the last 1x1 convolution, with `aux_head` that of each head; `nn.Identity` at `num_classes=0`."""
        return self.classifier if self.aux_classifier is None else (self.classifier, self.aux_classifier)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter groups from input to output: by stage if `coarse`, else by block."""
        blocks = r"^backbone\.layer(\d+)" if coarse else r"^backbone\.layer(\d+)\.(\d+)"
        return {"stem": r"^backbone\.(?:conv1|bn1|maxpool)", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block of the encoder in the backward pass instead of keeping its activations."""
        self.backbone.set_grad_checkpointing(enable)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the encoder's maps: (N, in_chans, H, W) -> what timm's `ResNet.forward_intermediates` returns."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the encoder's stages behind the highest of the levels `indices`, and the decoder; return the levels."""
        take = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        self.num_features = self.backbone.num_features
        if prune_head or self.num_features < self.feature_info[-1]["num_chs"]:
            self.decoder, self.aux_decoder, self.aux_classifier = nn.Identity(), None, None
            self.head_hidden_size = self.num_features
            self.reset_classifier(0)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Encode: (N, in_chans, H, W) -> (N, num_features, H', W'), at 1 / output_stride of the size."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Decode and classify: (N, num_features, H', W') -> (N, num_classes, H', W').

        With `pre_logits` decode alone, into (N, head_hidden_size, H', W').
        """
        x = self.decoder(x)
        return x if pre_logits else self.classifier(x)

    @torch.jit.ignore
    def _forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        third, last = self.backbone.forward_intermediates(x, indices=[3, 4], intermediates_only=True)
        aux = self.aux_classifier(self.aux_decoder(third))
        return self._enlarge(self.forward_head(last), x), self._enlarge(aux, x)

    def _enlarge(self, logits: Tensor, image: Tensor) -> Tensor:
        if self.num_classes == 0:
            return logits
        return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, bilinearly enlarged: (N, in_chans, H, W) -> (N, num_classes, H, W), or a pair of them."""
        if self.training and self.aux_classifier is not None and not torch.jit.is_scripting():
            return self._forward_with_aux(x)
        return self._enlarge(self.forward_head(self.forward_features(x)), x)


def _classifier(in_chs: int, num_classes: int) -> nn.Module:
    return nn.Conv2d(in_chs, num_classes, 1) if num_classes > 0 else nn.Identity()


WHOLE_CLASSIFIER = DeconvPolicy(roles={"classifier": {"block": 512}})
"""Published: the last convolutions whiten all of their 256 or 512 input channels together."""

register_family(
    __name__,
    SegmentationNet,
    {
        "deeplabv3_resnet50": {"layers": (3, 4, 6, 3), "decoder": "aspp", "drop_rate": 0.5},
        "deeplabv3_resnet101": {"layers": (3, 4, 23, 3), "decoder": "aspp", "drop_rate": 0.5},
        "fcn_resnet50": {"layers": (3, 4, 6, 3), "decoder": "fcn", "drop_rate": 0.1},
    },
    WHOLE_CLASSIFIER.over(frozen_stem(IMAGENET_POLICY, 15)),
    cfg={
        "input_size": (3, 513, 513),
        "pool_size": (65, 65),  # of the encoder's map
        "num_classes": 21,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": "backbone.conv1",
        "classifier": "classifier",
        "license": "apache-2.0",
        "paper_ids": "arXiv:1706.05587",
    },
    feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2, 3, 4)},
    in_place=True,
)
