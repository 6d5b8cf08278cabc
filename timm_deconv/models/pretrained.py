"""Pretrained networks of timm by name: with batch norm, or transferred to a deconvolution network of the same function.

Weights are those that timm downloads, those of an installed package, or a file's: by the names of its tensors, or by
their order where other names leave no doubt.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from torch import Tensor, nn

from timm_deconv.convert import DeconvPolicy, transfer
from timm_deconv.convert.head import GENERIC_NAME, ConvertedNetwork
from timm_deconv.errors import InputError, unknown_name

from .checkpoints import by_name_or_order
from .registration import list_models
from .weights import TAG_PREFIX, packaged_weights, read_weights

__all__ = ["batch_norm_name", "create_batch_norm", "create_transferred"]


def create_batch_norm(network: str, checkpoint: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """Create a timm network with batch norm and its weights.

    Args:
        network: a name of timm's registry, with or without a tag.
        checkpoint: file of weights, in place of those that timm downloads or an installed package has.
        kwargs: arguments of the network, as in `timm.create_model`.

    Raises:
        InputError: an unknown name, or a file that is not there or does not fit.
    """
    _check_name(network)
    name, tag = split_model_name_tag(network)
    with packaged_weights(name, {"pretrained_cfg": tag}) as arguments:
        file = checkpoint or arguments.get("pretrained_cfg_overlay", {}).get("file")
        if file is None:
            return timm.create_model(network, pretrained=True, **kwargs)

    def build(weights: Mapping[str, Tensor]) -> nn.Module:
        overlay = {"state_dict": dict(weights)} | {k: v for k, v in kwargs.items() if k == "num_classes"}
        return timm.create_model(network, pretrained=bool(weights), pretrained_cfg_overlay=overlay, **kwargs)

    model = by_name_or_order(build, read_weights(file), network)
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k != "state_dict"}  # type: ignore[operator, union-attr]
    return model


def create_transferred(
    network: str,
    checkpoint: str | Path | None = None,
    *,
    policy: str | Mapping[str, Any] | DeconvPolicy | None = None,
    keep_affine: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Create a deconvolution network that evaluates as the timm network with its weights does.

    Training starts from another function unless `timm_deconv.calibrate` comes first.

    Args:
        network: a name of timm's registry, with or without a tag, or `local-dir:` or `hf-hub:` and a place. A name that
            has a registered deconvolution form becomes that; others are converted and saved by the name `deconv`.
        checkpoint: file of weights, in place of those that timm downloads.
        policy: which layer is whitened how, as in `transfer`.
        keep_affine: as in `transfer`; for pre-norm networks.
        kwargs: arguments of the network, as in `timm.create_model`.

    Raises:
        InputError: an unknown name, a file that is not there or does not fit, or what `transfer` refuses.
    """
    _check_name(network)
    overlay: dict[str, Any] = {}
    if checkpoint is not None:
        read_weights(checkpoint)  # for its errors, before timm's
        overlay = {"file": str(checkpoint)} | {k: v for k, v in kwargs.items() if k == "num_classes"}
    name = network if keep_affine else _registered(network)
    if name.partition(".")[0] in list_models():
        kwargs["deconv"] = policy
    elif overlay and ":" not in network:  # the filter of our own networks reads other people's files too
        name, kwargs = GENERIC_NAME, kwargs | {"base": network, "deconv": policy, "keep_affine": keep_affine}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay or None, **kwargs)
    except RuntimeError as error:  # how timm says that a name or its weights are not there, or do not fit
        raise InputError(f"{network}: {textwrap.shorten(str(error), 300, placeholder=' ...')}") from error
    if not isinstance(model, ConvertedNetwork):
        transfer(model, policy, keep_affine=keep_affine)
    return model


def batch_norm_name(model: str) -> str:
    """Return the name of the batch-norm network that a deconvolution network is made from, other names as they are."""
    base = model.removesuffix("_deconv")
    return f"{base}_bn" if timm.is_model(f"{base}_bn") else base


def _check_name(network: str) -> None:
    if ":" not in network and not timm.is_model(network):
        raise unknown_name("network", network.partition(".")[0], timm.list_models())


def _registered(network: str) -> str:
    """Return the registered deconvolution form of a batch-norm name, with the tag of its weights; else the name itself.

    Without a tag those are meant that the batch-norm name alone means, and not those of the deconvolution form.
    """
    base, tag = split_model_name_tag(network)
    name = f"{base.removesuffix('_bn')}_deconv"
    if ":" in network or name not in list_models():
        return network
    cfg = timm.get_pretrained_cfg(base)
    tagged = f"{name}.{TAG_PREFIX}{tag or (cfg and cfg.tag)}"
    return tagged if tag or tagged in get_arch_pretrained_cfgs(name) else name
