"""What pretrained weights may be: a deconvolution network's own, folded, or those of the batch-norm network it is of.

timm calls the filter between reading a file and loading it. Batch-norm weights are loaded into the batch-norm network,
which is transferred as `timm_deconv.transfer` does it; the result is a deconvolution checkpoint like any other. Folded
weights get whiteners at the identity.
"""

import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from timm.models import get_arch_name, get_arch_pretrained_cfgs, model_entrypoint
from torch import Tensor, nn

from timm_deconv.convert import DeconvPolicy, transfer
from timm_deconv.convert.fuse import fuse_in_place
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.convert.policy import as_saved
from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d
from timm_deconv.layers.notices import OTHER_SETTINGS, share_notices

from .folded import NEEDED, STATISTICS, fold_weights, has_whitening, identity_statistics, is_folded, same_blocks
from .remap import remap_by_order
from .weights import TAG_PREFIX, arguments_of_weights, follow_saved

__all__ = ["batch_norm_filter", "by_name_or_order", "checkpoint_filter", "read_other_forms", "transferred_weights"]

AUXILIARY = "aux_"
"""Starts the names of heads that only training uses; weights and network may differ in having them."""

HALVES = (torch.float16, torch.bfloat16)

StateDict = Mapping[str, Tensor]
Filter = Callable[[StateDict, nn.Module], dict[str, Tensor]]
Build = Callable[[Any, dict[str, Any]], nn.Module]


def checkpoint_filter(
    build: Build,
    deconv: Any,
    *,
    transferred: Callable[[StateDict, nn.Module], StateDict] | None = None,
) -> Filter:
    """Return timm's filter of a deconvolution network.

    Args:
        build: (deconv, arguments) -> the whitening network of these settings, with arguments in place of its own; on
            the meta device.
        deconv: the network's settings.
        transferred: (batch-norm weights, model) -> the model's, or those folded; None where there can be none.

    Returns:
        (state dict, model) -> the state dict that fits the model but for what timm adapts: the stem's weight to other
        input channels, and the classifier, which is dropped for another number of classes. A stem of other input
        channels gets the folded weight and starts from identity whitening; so a network made for one channel gives on
        grey pictures what the checkpoint gives on their copies in three channels. Weights are folded for a network
        without whitening layers, and where whitening means something else in them than in the model. The filter raises
        InputError where the weights are another network's, or of batch norms that cannot be folded.
    """

    def filter_fn(state_dict: StateDict, model: nn.Module) -> dict[str, Tensor]:
        saved = arguments_of_weights(model)
        follow_saved(model, saved)
        state_dict = {key: value.float() if value.dtype in HALVES else value for key, value in state_dict.items()}
        if transferred is not None and _of_batch_norms(state_dict, model):
            state_dict = transferred(state_dict, model)
        elif has_whitening(state_dict):
            state_dict = _in_the_models_settings(state_dict, model, build, deconv, saved)
        _add_missing_biases(state_dict, model)
        if not has_whitening(state_dict):
            state_dict = {**state_dict, **identity_statistics(model)}
        _check_settings(state_dict, model)
        weights = _fitting_heads(_fitting_statistics(state_dict, model), model)
        _check_fit(weights, model)
        share_notices(model).uncalibrated = _batches_seen(weights) == 0
        return weights

    return filter_fn


def batch_norm_filter(model_cls: type[nn.Module], arguments: Mapping[str, Any]) -> Filter:
    """Return timm's filter of a batch-norm network, which takes tensors by other names than its own by their order.

    So the network reads the files that its deconvolution form reads, and refuses the same, with an InputError.

    Args:
        model_cls: builds the network.
        arguments: what it is built with; read when weights are loaded.
    """

    def filter_fn(state_dict: StateDict, model: nn.Module) -> dict[str, Tensor]:
        follow_saved(model, arguments_of_weights(model))
        if not model.state_dict().keys() & state_dict.keys():
            state_dict = _remapped(state_dict, model, model_cls, arguments)
        weights = _fitting_heads(state_dict, model)
        _check_fit(weights, model)
        return weights

    return filter_fn


def read_other_forms(model: nn.Module) -> None:
    """Let `load_state_dict` take folded weights, and refuse, in one line, those that only the filter can read.

    So do `checkpoint_path=` and timm's scripts by --initial-checkpoint, which read a file without the filter.
    """
    model.register_load_state_dict_pre_hook(_take_or_refuse)


BY_THE_FILTER = (
    "create_model(..., pretrained=True, pretrained_cfg_overlay={'file': FILE}) %s them, as --pretrained"
    " --pretrained-path FILE of timm's scripts does"
)


def _take_or_refuse(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if _of_batch_norms(weights, model):
        raise InputError(f"these are weights of a batch-norm network: {BY_THE_FILTER % 'transfers'}")
    if has_whitening(weights) and not is_whitened(model):
        raise InputError(f"these weights are not fused, as the network is: {BY_THE_FILTER % 'folds'}")
    if is_folded(weights, model):
        _add_missing_biases(weights, model)
        weights |= identity_statistics(model)
        state_dict.update({prefix + key: value for key, value in weights.items()})
    _check_settings(weights, model)
    if is_whitened(model) and (seen := _batches_seen(weights)) is not None:
        share_notices(model).uncalibrated = seen == 0


def _batches_seen(state_dict: StateDict) -> int | None:
    """Return the most training batches that a whitening layer has seen; None where no such layer has a counter."""
    layers = (key.removesuffix("running_deconv") for key in state_dict if key.endswith("running_deconv"))
    counters = (state_dict.get(f"{layer}num_batches_tracked") for layer in layers)
    return max((int(counter) for counter in counters if counter is not None and not counter.is_meta), default=None)


# Batch-norm weights


def _of_batch_norms(state_dict: StateDict, model: nn.Module) -> bool:
    """Return whether there are running variances that the model lacks."""
    known = model.state_dict()
    return any(key.endswith(".running_var") and key not in known for key in state_dict)


def transferred_weights(
    state_dict: StateDict, model: Any, source: str, arguments: Mapping[str, Any], keep_affine: bool
) -> StateDict:
    """Return the state dict of the batch-norm network with these weights after `transfer`, fused if the model is.

    Args:
        state_dict: the weights.
        model: that is to have them.
        source: name of the batch-norm network in timm's registry.
        arguments: what it is built with.
        keep_affine: as in `transfer`.
    """
    cfg = model.pretrained_cfg
    tag = (cfg.get("tag") or "").removeprefix(TAG_PREFIX)
    options = {**arguments, "in_chans": cfg["input_size"][0]}
    if "aux_head" in options:
        options["aux_head"] = any(key.startswith(AUXILIARY) for key in state_dict)
    for name in ("device", "global_pool"):  # the pooling has no weights, and some networks need one for a classifier
        options.pop(name, None)
    options["pretrained_cfg"] = tag if f"{get_arch_name(source)}.{tag}" in get_arch_pretrained_cfgs(source) else None

    def build(num_classes: int, weights: StateDict) -> nn.Module:
        described = {"num_classes": num_classes, "input_size": cfg["input_size"], "state_dict": dict(weights)}
        settings = {**options, "num_classes": num_classes, "pretrained_cfg_overlay": described}
        with torch.device("cpu"):
            return model_entrypoint(source)(pretrained=bool(weights), **settings)

    network = by_name_or_order(partial(build, _classes(state_dict, model, build)), state_dict, source)
    transfer(network, model.deconv_policy, keep_affine=keep_affine, family=DeconvPolicy())
    if not is_whitened(model):
        fuse_in_place(network)
    return network.state_dict()


def _classes(state_dict: StateDict, model: Any, build: Callable[[int, StateDict], nn.Module]) -> int:
    """Return how many classes the network of these weights has: 0 where they lack a classifier that the model replaces.

    They lack it where as many tensors are missing as it has; then all others are there, or none fits.
    """
    cfg = model.pretrained_cfg
    described: int = cfg["num_classes"]
    classifier = tuple(f"{name}." for name in _names(cfg, "classifier"))
    replaced = getattr(model, "num_classes", None) != described
    if not replaced and any(key.startswith(classifier) for key in model.state_dict()):
        return described
    others = sum(not key.startswith(classifier) for key in build(described, {}).state_dict())
    return 0 if len(state_dict) == others else described


def by_name_or_order(build: Callable[[StateDict], nn.Module], state_dict: StateDict, source: str) -> nn.Module:
    """Build a timm network with a file's weights: by the names of the tensors, as timm reads them, else by their order.

    Args:
        build: (state dict) -> the network as timm loads it; of an empty one, without weights.
        state_dict: the file's tensors.
        source: the network's name.

    Raises:
        InputError: they do not fit either way.
    """
    expected = build({}).state_dict()
    translated = hasattr(sys.modules[model_entrypoint(get_arch_name(source)).__module__], "checkpoint_filter_fn")
    reason = "" if translated else _missing_or_unexpected(state_dict, expected)  # some families load what there is
    if not reason:
        try:
            return build(state_dict)
        except Exception as error:  # of timm's filters too, which expect the keys of their own files
            reason = str(error)
    try:
        remapped = remap_by_order(state_dict, expected)
    except InputError as error:
        reason = reason if expected.keys() & state_dict.keys() else f"no name is known, and by order {error}"
        reason = textwrap.shorten(reason, 300, placeholder=" ...")
        raise InputError(f"these batch-norm weights do not fit {source}: {reason}") from None
    return build(remapped)


def _missing_or_unexpected(state_dict: StateDict, expected: StateDict) -> str:
    optional = re.compile(rf"num_batches_tracked$|(^|\.){AUXILIARY}|^AuxLogits\.")
    named = {"missing": expected.keys() - state_dict.keys(), "unexpected": state_dict.keys() - expected.keys()}
    return _listed({what: [key for key in keys if not optional.search(key)] for what, keys in named.items()})


def _remapped(state_dict: StateDict, model: Any, model_cls: type[nn.Module], arguments: Mapping[str, Any]) -> StateDict:
    """Return the tensors by the names of a network of as many channels and classes as their description says."""
    cfg = model.pretrained_cfg
    described = {"num_classes": cfg["num_classes"], "in_chans": cfg["input_size"][0]}
    options = {key: value for key, value in arguments.items() if key != "global_pool"} | described
    with torch.device("meta"):
        expected = model_cls(**options).state_dict()
    try:
        return remap_by_order(state_dict, expected)
    except InputError as error:
        raise InputError(
            f"these weights do not fit {cfg['architecture']}: no name is known, and by order {error}"
        ) from None


def _add_missing_biases(state_dict: StateDict, model: nn.Module) -> None:
    """Give biases to layers that the policy leaves plain and that took a batch norm in."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and f"{name}.bias" in state_dict and module._parameters.get("bias", weight) is None:
            module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))


# Deconvolution weights


def _in_the_models_settings(
    state_dict: StateDict, model: Any, build: Build, deconv: Any, saved: Mapping[str, Any] | None
) -> StateDict:
    """Return weights as they are where whitening means the same in the model; else folded."""
    trained_under = as_saved(saved["deconv"], saved) if saved and "deconv" in saved else deconv
    if is_whitened(model) and _same_settings(trained_under, deconv):
        return state_dict
    cfg = model.pretrained_cfg
    classifier = tuple(f"{name}." for name in _names(cfg, "classifier"))
    classes = cfg["num_classes"] if any(key.startswith(classifier) for key in state_dict) else 0
    arguments = {"num_classes": classes, "in_chans": cfg["input_size"][0]}
    auxiliary = any(key.startswith(AUXILIARY) for key in state_dict)
    network: Any = build(trained_under, {**arguments, "aux_head": auxiliary})
    if is_whitened(model) and same_blocks(network, build(deconv, arguments)):
        return state_dict
    network.pretrained_cfg = {**cfg, "num_classes": classes}
    follow_saved(network, saved)
    _add_missing_biases(state_dict, network)
    _check_settings(state_dict, network)
    weights = _fitting_statistics(state_dict, network)
    _check_fit(weights, network)
    if is_whitened(model):
        share_notices(model).say(OTHER_SETTINGS)
    return fold_weights(weights, network)


def _same_settings(a: Any, b: Any) -> bool:
    """Return whether two settings are surely the same; their versions tell what a preset meant."""
    return a == b and getattr(a, "version", None) == getattr(b, "version", None)


def _check_settings(state_dict: StateDict, model: nn.Module) -> None:
    known = model.state_dict()
    for key in sorted(key for key in known.keys() & state_dict.keys() if key.endswith(NEEDED)):
        weight = f"{key.rpartition('.')[0]}.weight"
        alike = weight in state_dict and state_dict[weight].shape == known[weight].shape
        if alike and known[key].shape != state_dict[key].shape:
            raise InputError(
                f"these weights were trained under other whitening settings ({key} is of another shape): give deconv="
                " as in training, or load their folder or repository, whose config.json says it"
            )


def _optional(key: str) -> bool:
    return key.endswith(STATISTICS) and not key.endswith(NEEDED)


def _fitting_statistics(state_dict: StateDict, model: nn.Module) -> dict[str, Tensor]:
    """Leave out statistics of layers that the model lacks, and fold those of layers of other input channels."""
    for name, layer in model.named_modules():
        mean = state_dict.get(f"{name}.running_mean")
        if isinstance(layer, Deconv2d) and mean is not None and mean.shape != layer.running_mean.shape:
            state_dict = {**state_dict, **_refolded(name, layer, state_dict)}
    known = model.state_dict()
    return {key: value for key, value in state_dict.items() if key in known or not key.endswith(STATISTICS)}


def _refolded(name: str, layer: Deconv2d, state_dict: StateDict) -> dict[str, Tensor]:
    """Return the folded weight of a layer of other input channels, and the statistics that the model's starts with."""
    weight = state_dict[f"{name}.weight"]
    source = Deconv2d(
        weight.shape[1] * layer.groups, layer.out_channels, layer.kernel_size, groups=layer.groups, cfg=layer.cfg
    )
    prefix = f"{name}."
    source.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
    folded, bias = (value.detach() for value in source.folded())
    fresh = {f"{prefix}{key}": value for key, value in layer.state_dict().items() if key not in ("weight", "bias")}
    return {f"{prefix}weight": folded, f"{prefix}bias": bias, **fresh}


# Both


def _fitting_heads(state_dict: StateDict, model: nn.Module) -> dict[str, Tensor]:
    """Leave out auxiliary heads that the model lacks, or has for other classes."""
    known = model.state_dict()
    fits = {key for key, value in state_dict.items() if key in known and known[key].shape == value.shape}
    return {key: value for key, value in state_dict.items() if not key.startswith(AUXILIARY) or key in fits}


def _check_fit(state_dict: StateDict, model: Any) -> None:
    """Say in one line what does not fit, before timm does so in many; what timm adapts is left to it."""
    cfg, known = model.pretrained_cfg, model.state_dict()
    adapted = {f"{name}.weight" for name in _names(cfg, "first_conv")}
    replaced: tuple[str, ...] = ()
    if getattr(model, "num_classes", None) != cfg.get("num_classes"):
        replaced = (AUXILIARY, *(f"{name}." for name in _names(cfg, "classifier")))
    shared = known.keys() & state_dict.keys() - adapted
    wrong = {
        "missing": known.keys() - state_dict.keys(),
        "unexpected": state_dict.keys() - known.keys(),
        "of another shape": {key for key in shared if known[key].shape != state_dict[key].shape},
    }
    kept = {what: [k for k in keys if not k.startswith(replaced) and not _optional(k)] for what, keys in wrong.items()}
    if listed := _listed(kept):
        name = cfg.get("architecture") or type(model).__name__
        raise InputError(f"these weights do not fit {name}: {listed}; load them into the network they are of")


def _listed(keys: Mapping[str, Collection[str]]) -> str:
    """Name some of the keys of each kind, as in '2 missing (a, b); 1 unexpected (c)'; '' where there are none."""
    return "; ".join(
        f"{len(found)} {what} ({', '.join(sorted(found)[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in keys.items()
        if found
    )


def _names(cfg: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = cfg.get(key) or ()
    return (value,) if isinstance(value, str) else tuple(value)
