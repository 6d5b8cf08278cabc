"""carry_over: a pretrained batch-norm network by name, as a deconvolution network of the same function."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import split_model_name_tag
from torch import Tensor, nn

from timm_deconv.convert import transfer
from timm_deconv.convert.head import GENERIC_NAME, ConvertedNetwork
from timm_deconv.errors import InputError, unknown_name

from ._checkpoints import TAG_PREFIX, by_name_or_order
from ._packages import packaged_weights
from ._registration import list_models
from .weights import read_weights

__all__ = ["batch_norm_network", "carry_over"]


def carry_over(
    network: str,
    checkpoint: str | Path | None = None,
    *,
    policy: str | None = None,
    keep_affine: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm network with its weights and make it a deconvolution network that evaluates the same.

    Training starts from another function unless `timm_deconv.calibrate` comes first.

    Args:
        network: a name of timm's registry, with or without a tag, or `local-dir:` or `hf-hub:` and a place. A name that
            has a registered deconvolution form becomes that; others are converted and saved by the name `deconv`.
        checkpoint: file of weights, in place of those that timm downloads.
        policy: a preset's name, or JSON of a dictionary of options.
        keep_affine: as in `transfer`; for pre-norm networks.
        kwargs: arguments of the network, as in `timm.create_model`.

    Raises:
        InputError: an unknown name, a file that is not there or does not fit, or what `transfer` refuses.
    """
    deconv = _policy(policy)
    _check_name(network)
    overlay: dict[str, Any] = {}
    if checkpoint is not None:
        read_weights(checkpoint)  # for its errors, before timm's
        overlay = {"file": str(checkpoint)} | {k: v for k, v in kwargs.items() if k == "num_classes"}
    name = network if keep_affine else _registered(network)
    if name.partition(".")[0] in list_models():
        kwargs["deconv"] = deconv
    elif overlay and ":" not in network:  # the filter of our own networks reads other people's files too
        name, kwargs = GENERIC_NAME, kwargs | {"base": network, "deconv": deconv, "keep_affine": keep_affine}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay or None, **kwargs)
    except RuntimeError as error:  # how timm says that a name or its weights are not there, or do not fit
        raise InputError(f"{network}: {textwrap.shorten(str(error), 300, placeholder=' ...')}") from error
    if not isinstance(model, ConvertedNetwork):
        transfer(model, deconv, keep_affine=keep_affine)
    return model


def batch_norm_network(network: str, checkpoint: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """A timm network with batch norm and its weights, which `carry_over` makes a deconvolution network of.

    Args:
        network: a name of timm's registry, with or without a tag.
        checkpoint: file of weights, in place of those that timm downloads or an installed package has.
        kwargs: arguments of the network, as in `timm.create_model`.

    Raises:
        InputError: an unknown name, or a file that is not there or does not fit.
    """
    _check_name(network)
    with packaged_weights(*split_model_name_tag(network), {}) as arguments:
        file = checkpoint or arguments.get("pretrained_cfg_overlay", {}).get("file")
        if file is None:
            return timm.create_model(network, pretrained=True, **kwargs)

    def build(weights: Mapping[str, Tensor]) -> nn.Module:
        overlay = {"state_dict": dict(weights)} | {k: v for k, v in kwargs.items() if k == "num_classes"}
        return timm.create_model(network, pretrained=bool(weights), pretrained_cfg_overlay=overlay, **kwargs)

    model = by_name_or_order(build, read_weights(file), network)
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k != "state_dict"}  # type: ignore[operator, union-attr]
    return model


def _check_name(network: str) -> None:
    if ":" not in network and not timm.is_model(network):
        raise unknown_name("network", network.partition(".")[0], timm.list_models())


def _registered(network: str) -> str:
    """The registered deconvolution form of a batch-norm name, with the tag of its weights; else the name itself."""
    base, tag = split_model_name_tag(network)
    name = f"{base.removesuffix('_bn')}_deconv"
    if ":" in network or name not in list_models():
        return network
    return f"{name}.{TAG_PREFIX}{tag}" if tag else name


def _policy(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"policy {text!r} is not JSON: {error}") from None
