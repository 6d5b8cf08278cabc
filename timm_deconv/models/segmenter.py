"""The name `segmenter`: any timm network as the encoder of a network for dense prediction, with an ASPP head.

Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017, with half of its channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from timm_deconv.convert import DeconvPolicy, convert_deconv_model, resolve_policy, transfer
from timm_deconv.convert.fuse import fuse_in_place
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.convert.policy import as_saved
from timm_deconv.convert.roles import find_roles
from timm_deconv.errors import InputError, unknown_name

from .checkpoints import checkpoint_filter, read_other_forms
from .deeplabv3 import ASPP
from .named_weights import named_weights
from .registration import build_model, default_cfg, tagged_cfgs

__all__ = ["Segmenter", "create_encoder", "segmenter"]

NAME = "segmenter"
ENCODER, CLASSIFIER = "encoder.", "head.1"
HEAD_CHS = 128
RATES = (3, 6, 9)
"""Dilations of the ASPP: a quarter of DeepLabV3's, as maps of small images have as much less positions."""

default_cfgs = generate_default_cfgs(tagged_cfgs(NAME, {}))


class Head(nn.Sequential):
    """What is new on an encoder: its last layer is the classifier."""

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self[-1]


class Segmenter(nn.Module):
    """An encoder of timm at output stride 16, an ASPP and a 1x1 classifier, enlarged to the input: (N, classes, H, W).

    Args:
        encoder: gives a list of maps, of which the last is read.
        num_classes: of a pixel.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes, self.num_features = num_classes, HEAD_CHS
        chs = encoder.feature_info.channels()[-1]  # type: ignore[operator, union-attr]
        self.head = Head(ASPP(chs, HEAD_CHS, RATES, drop_rate=0.1), nn.Conv2d(HEAD_CHS, num_classes, 1))

        self.deconv_policy: DeconvPolicy | None = None

    def whiten(self, deconv: str | Mapping[str, Any] | DeconvPolicy, input_size: tuple[int, ...] | None = None) -> None:
        """Replace batch norms by whitening, in place.

        Args:
            deconv: a preset's name, a dictionary over a preset, or a `DeconvPolicy`.
            input_size: (C, H, W) of the images, where the encoder is to compute what it did, as `timm_deconv.transfer`
                makes it; None leaves that.
        """
        self.deconv_policy = resolve_policy(deconv)
        encoder, head = (_of_its_roles(self.deconv_policy, part) for part in (self.encoder, self.head))
        if input_size is None:
            convert_deconv_model(self.encoder, encoder)
        else:
            transfer(self.encoder, encoder, input_size=input_size)
        convert_deconv_model(self.head, head)

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm records to build the network again, with the policy by its full name."""
        whitened: dict[str, Any] = {} if self.deconv_policy is None else {"deconv": self.deconv_policy.to_dict()}
        if whitened and not is_whitened(self):
            whitened["fused"] = True
        return {**self.__dict__.get("_recorded_args", {}), **whitened}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self.__dict__["_recorded_args"] = {k: v for k, v in args.items() if k not in ("deconv", "fused")}

    def get_classifier(self) -> nn.Module:
        """Return the last convolution."""
        return self.head.get_classifier()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, bilinearly enlarged: (N, in_chans, H, W) -> (N, num_classes, H, W)."""
        logits = self.head(self.encoder(x)[-1])
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)


def _of_its_roles(policy: DeconvPolicy, part: nn.Module) -> DeconvPolicy:
    """Leave out what is said of roles that no layer of a part has, as each part is converted for itself."""
    present = set(find_roles(part).values())
    return replace(policy, roles={role: options for role, options in policy.roles.items() if role in present})


def create_encoder(base: str, **arguments: Any) -> nn.Module:
    """Create a timm network without its classifier, that gives a list of its last map, at a sixteenth of the size.

    Args:
        base: name of a batch-norm network.
        arguments: of `timm.create_model`.

    Raises:
        InputError: a network that cannot be had at this resolution.
    """
    try:
        return timm.create_model(base, features_only=True, out_indices=(-1,), output_stride=16, **arguments)
    except (TypeError, AssertionError, NotImplementedError, AttributeError) as error:
        raise InputError(f"{base} is no encoder: it cannot be dilated to an output stride of 16 ({error})") from error


def _in_the_encoder(name: str | None) -> str | None:
    """Return the name that a layer of the base has in the segmenter."""
    return name if name is None or name.startswith(ENCODER) else f"{ENCODER}{name}"


@register_model
def segmenter(
    pretrained: bool = False,
    *,
    base: str | None = None,
    deconv: Any = None,
    fused: bool = False,
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Create the timm network `base` with a head that gives a class for each pixel.

    Args:
        pretrained: load weights: by a tag, or of a saved network, by `local-dir:` or `hf-hub:`.
        base: name of a batch-norm network.
        deconv: a preset's name, a dictionary over a preset, or a `DeconvPolicy`; None leaves the batch norms.
        fused: make the plain network that `timm_deconv.fuse` makes of it.
        pretrained_cfg: as in `timm.create_model`; otherwise what `base` says of its input.
        kwargs: `num_classes`, and arguments of `base`.

    Raises:
        InputError: no `base`, or one that timm does not know or that cannot be an encoder; `features_only`; or the
            weights do not fit.
    """
    given = {"base": base, "deconv": deconv, "pretrained_cfg": pretrained_cfg, **kwargs}
    if given.pop("features_only", False):
        raise InputError(f"{NAME} gives classes, no maps of features: create its base with features_only=True")
    given = named_weights(NAME, given, pretrained=pretrained)
    base = given.pop("base", None)
    if not isinstance(base, str) or not timm.is_model(base):
        raise unknown_name(f"base of {NAME}", str(base), timm.list_models())
    cfg = given.pop("pretrained_cfg", None) or {**default_cfg(base), "architecture": NAME}
    if isinstance(cfg, Mapping):
        cfg = {**cfg, "classifier": CLASSIFIER, "first_conv": _in_the_encoder(cfg.get("first_conv"))}
    policy = as_saved(given.pop("deconv", None), given.get("pretrained_model_args"))
    arguments: dict[str, Any] = {}

    def whitened(settings: Any, num_classes: int = 21, **given: Any) -> Segmenter:
        model = Segmenter(create_encoder(base, **given), num_classes)
        if settings is not None:
            model.whiten(settings)
        return model

    def build(**given: Any) -> nn.Module:
        arguments.update(given)
        model = whitened(policy, **given)
        if fused:
            fuse_in_place(model)
        if policy is not None:
            read_other_forms(model)
        return model

    def without_data(settings: Any, others: dict[str, Any]) -> nn.Module:
        others.pop("aux_head", None)
        with torch.device("meta"):
            return whitened(settings, **{**arguments, **others})

    filter_fn = None if policy is None else checkpoint_filter(without_data, policy)
    return build_model(build, NAME, pretrained, pretrained_cfg=cfg, pretrained_filter_fn=filter_fn, **given)
