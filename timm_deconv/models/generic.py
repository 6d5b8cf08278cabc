"""The name `deconv`: any timm network as a deconvolution network, `timm.create_model('deconv', base='regnety_008')`.

What `convert_deconv_model` makes of a timm network is saved by this name, so that timm loads it again.
"""

from typing import Any

import timm
from timm.models import generate_default_cfgs, get_arch_name, register_model
from torch import nn

from timm_deconv.convert import convert_deconv_model, transfer
from timm_deconv.convert.head import GENERIC_NAME
from timm_deconv.errors import InputError, unknown_name

from .named_weights import named_weights
from .registration import build_deconv, default_cfg, list_models, tagged_cfgs

__all__ = ["deconv"]

default_cfgs = generate_default_cfgs(tagged_cfgs(GENERIC_NAME, {}))


@register_model
def deconv(
    pretrained: bool = False,
    *,
    base: str | None = None,
    deconv: Any = None,
    fused: bool = False,
    keep_affine: bool = False,
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Create the timm network `base` with its layers whitened and its batch norms removed.

    Args:
        pretrained: load weights; there are some where a saved network is loaded, by `local-dir:` or `hf-hub:`. Those of
            a batch-norm network evaluate as before; training starts from another function unless the network is
            calibrated first (`timm_deconv.calibrate`, or `python -m timm_deconv --calibrate DATA SCRIPT.py`).
        base: name of the network, with or without a tag.
        deconv: a preset's name, a dictionary over a preset, or a `DeconvPolicy`, as in `convert_deconv_model`.
        fused: make the plain network that `timm_deconv.fuse` makes of it.
        keep_affine: keep a scale and shift of each channel where `transfer` would.
        pretrained_cfg: as in `timm.create_model`; otherwise what `base` says of its input.
        kwargs: arguments of `base`.

    Raises:
        InputError: no `base`, one that timm does not know or that is a deconvolution network already, or weights that
            do not fit.
    """
    given = {"base": base, "deconv": deconv, "pretrained_cfg": pretrained_cfg, **kwargs}
    given = named_weights(GENERIC_NAME, given, pretrained=pretrained)
    base = _check_base(given.pop("base", None))
    pretrained_cfg = given.pop("pretrained_cfg", None) or {**default_cfg(base), "architecture": GENERIC_NAME}

    def convert(model: nn.Module, settings: Any) -> None:
        if keep_affine:
            transfer(model, settings, keep_affine=True)
        else:
            convert_deconv_model(model, settings)

    return build_deconv(
        GENERIC_NAME,
        base,
        convert,
        pretrained,
        feature_cfg={"feature_cls": "getter"},
        fused=fused,
        keep_affine=keep_affine,
        pretrained_cfg=pretrained_cfg,
        **given,
    )


def _check_base(base: str | None) -> str:
    if not isinstance(base, str) or not base:
        raise InputError("deconv: base= is missing; name one of timm.list_models(), as in base='regnety_008'")
    name = get_arch_name(base)
    if name in (GENERIC_NAME, *list_models()):
        raise InputError(f"base={base!r} is a deconvolution network already: create it by this name")
    if not timm.is_model(name):
        raise unknown_name("network to be the base,", base, timm.list_models())
    return base
