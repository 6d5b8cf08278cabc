"""Registration with timm: `register_family` for networks of this package, `register_deconv` for networks of timm.

Both make `<name>_deconv`. timm (or the family's class) builds the batch-norm network, the converter changes its layers,
and timm's builder goes on with weights and feature extraction as for any of its own models.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from torch import Tensor, nn

from timm_deconv.convert import DeconvPolicy, convert_deconv_model
from timm_deconv.convert.fuse import fuse_in_place
from timm_deconv.convert.policy import SMALL_BATCH_DEFAULTS, as_saved
from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv, Conv2dSame, Deconv2d, Deconv2dSame, DeconvLinear
from timm_deconv.layers.notices import share_notices

from .checkpoints import batch_norm_filter, checkpoint_filter, read_other_forms, transferred_weights
from .checksums import check_recorded
from .named_weights import entry_cfgs, named_weights, without_weights
from .weights import TAG_PREFIX, packaged_weights, readable

__all__ = [
    "CIFAR_POLICY",
    "IMAGENET_POLICY",
    "build_deconv",
    "cifar_cfg",
    "default_cfg",
    "frozen_stem",
    "list_models",
    "register_deconv",
    "register_family",
    "when_transferred",
]

for _layer in (Deconv2d, Deconv2dSame, DeconvLinear, ChannelDeconv, Conv2dSame):
    register_notrace_module(_layer)

FamilyPolicy = DeconvPolicy | Callable[[nn.Module], DeconvPolicy]
"""What the preset 'paper' means for a family; made from the batch-norm network where it depends on its channels."""

CIFAR_POLICY = DeconvPolicy(roles={"classifier": {"block": 512}})
"""32x32 networks of the paper's Table 1: published behaviour throughout."""

IMAGENET_POLICY = SMALL_BATCH_DEFAULTS
"""ImageNet networks, as converted ones: layers that see fewer rows than features are kept in bounds. Where nothing is
published at this scale, a family's networks take the exceptions of its 32x32 network."""


def frozen_stem(policy: DeconvPolicy, n_iter: int) -> DeconvPolicy:
    """Return the policy with a first layer that freezes after 101 forwards and takes `n_iter` steps."""
    return DeconvPolicy(roles={"stem": {"freeze": True, "n_iter": n_iter}}).over(policy)


def cifar_cfg(**differences: Any) -> dict[str, Any]:
    """Return the default_cfg of a 32x32 network; `differences` are fields of `timm.models.PretrainedCfg`."""
    shared = {
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "num_classes": 10,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }
    return {**shared, **differences}


# Tables to entry points

_deconv_names: list[str] = []


def list_models() -> list[str]:
    """Return the names of all registered deconvolution networks, sorted."""
    return sorted(_deconv_names)


def register_family(
    module: str,
    model_cls: type[nn.Module],
    table: Mapping[str, Mapping[str, Any]],
    policy: FamilyPolicy,
    *,
    cfg: Mapping[str, Any],
    feature_cfg: Mapping[str, Any] = {"flatten_sequential": True},
    in_place: bool = False,
) -> None:
    """Register batch-norm networks of this package and the deconvolution form `<name>_deconv` of each.

    Args:
        module: `__name__` of the family's module, which gets the entry points and `default_cfgs`.
        model_cls: builds a network from a row's arguments and the user's.
        table: model name -> constructor arguments that make it.
        policy: what the preset 'paper' means for the deconvolution forms.
        cfg: the networks' default_cfg.
        feature_cfg: how `features_only=True` works, as in timm's builder; by default as for a `StagedNet` of five
            levels.
        in_place: every norm stands directly behind a convolution; see `convert_deconv_model`.
    """
    _add_default_cfgs(module, {key: own for name in table for key, own in tagged_cfgs(name, cfg).items()})
    for name, arguments in table.items():
        _publish(module, name, _batch_norm_entry_point(name, model_cls, arguments, feature_cfg))
    register_deconv(module, table, policy, feature_cfg=feature_cfg, in_place=in_place)


def register_deconv(
    module: str,
    sources: Iterable[str],
    policy: FamilyPolicy,
    *,
    feature_cfg: Mapping[str, Any] | None = None,
    in_place: bool = False,
) -> None:
    """Register `<source>_deconv` (without a `_bn` of the source's name) for batch-norm networks that timm knows.

    Args:
        module: `__name__` of the family's module, which gets the entry points and `default_cfgs`.
        sources: names of the batch-norm networks.
        policy: what the preset 'paper' means for them.
        feature_cfg: how `features_only=True` works, as in timm's builder.
        in_place: every norm stands directly behind a convolution; see `convert_deconv_model`.
    """
    names = {source: f"{source.removesuffix('_bn')}_deconv" for source in sources}
    for source, name in names.items():
        _add_default_cfgs(module, _deconv_cfgs(name, source))
    for source, name in names.items():
        _publish(module, name, _deconv_entry_point(name, source, policy, feature_cfg or {}, in_place))
    _deconv_names.extend(names.values())


def tagged_cfgs(name: str, cfg: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return a network's configurations by NAME.TAG, those of its entries in the zoo; by NAME alone if it has none."""
    return dict(entry_cfgs(name, cfg)) or {name: cfg}


def _add_default_cfgs(module: str, cfgs: Mapping[str, Mapping[str, Any]]) -> None:
    namespace = sys.modules[module]
    namespace.default_cfgs = {**getattr(namespace, "default_cfgs", {}), **generate_default_cfgs(cfgs)}  # type: ignore[attr-defined]


def _publish(module: str, name: str, entry_point: Callable[..., nn.Module]) -> None:
    """Register an entry point with timm as if it were written in the family's module."""
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    setattr(sys.modules[module], name, register_model(entry_point))


def _batch_norm_entry_point(
    name: str, model_cls: type[nn.Module], arguments: Mapping[str, Any], feature_cfg: Mapping[str, Any]
) -> Callable[..., nn.Module]:
    def entry_point(
        pretrained: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        _check_counts(kwargs)
        kwargs = named_weights(name, kwargs, pretrained=pretrained)
        built_with: dict[str, Any] = {}

        def build(**given: Any) -> nn.Module:
            built_with.update(given)
            return model_cls(**given)

        with nullcontext() if device is None else torch.device(device):
            model = build_model(
                build,
                name,
                pretrained,
                feature_cfg=dict(feature_cfg),
                pretrained_filter_fn=batch_norm_filter(model_cls, built_with),
                **{**arguments, **kwargs},
            )
        return model.to(dtype=dtype)

    entry_point.__doc__ = f"{name}: batch-norm form; arguments as in `timm.create_model`."
    return entry_point


def _deconv_entry_point(
    name: str, source: str, policy: FamilyPolicy, feature_cfg: Mapping[str, Any], in_place: bool
) -> Callable[..., nn.Module]:
    def convert(model: nn.Module, deconv: Any) -> None:
        family = policy if isinstance(policy, DeconvPolicy) else policy(model)
        convert_deconv_model(model, deconv, family=family, in_place=in_place)

    def entry_point(pretrained: bool = False, *, deconv: Any = None, fused: bool = False, **kwargs: Any) -> nn.Module:
        kwargs = {"deconv": deconv, "fused": fused, **kwargs}
        if pretrained and not kwargs.get("pretrained_cfg"):  # the default's, which a package has or not
            kwargs["pretrained_cfg"] = getattr(get_pretrained_cfg(name), "tag", None)
        with packaged_weights(source, kwargs) if pretrained else nullcontext(kwargs) as options:
            return build_deconv(name, source, convert, pretrained, feature_cfg=feature_cfg, **options)

    entry_point.__doc__ = f"""Create {source} with every convolution and the classifier whitened and no batch norm.

    `deconv` is a preset's name, a dictionary over a preset, or a `DeconvPolicy`; `fused=True` makes the plain network
    that `timm_deconv.fuse` makes of it, for its weights; other arguments as in `timm.create_model`.

    {_about_weights(source)}
    """
    return entry_point


def build_deconv(
    name: str,
    source: str,
    convert: Callable[[nn.Module, Any], object],
    pretrained: bool,
    *,
    feature_cfg: Mapping[str, Any],
    deconv: Any = None,
    fused: bool = False,
    keep_affine: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build the deconvolution network `name` as timm's entry points do.

    Args:
        name: in timm's registry.
        source: the batch-norm network that it is made from.
        convert: turns a new batch-norm network into a deconvolution network of these settings, in place.
        pretrained, feature_cfg: as in timm's builder.
        deconv: the settings.
        fused: make the plain network that `timm_deconv.fuse` makes of it.
        keep_affine: as in `transfer`, of batch-norm weights.
        kwargs: other arguments of timm's builder and of `source`.

    Raises:
        InputError: `num_classes` or `in_chans` makes no sense, or the weights do not fit.
    """
    _check_counts(kwargs)
    kwargs = named_weights(name, {"deconv": deconv, **kwargs}, source, pretrained=pretrained)
    requested = as_saved(kwargs.pop("deconv", None), kwargs.get("pretrained_model_args"))
    arguments: dict[str, Any] = {}

    def whitened(settings: Any, given: Mapping[str, Any]) -> nn.Module:
        model = model_entrypoint(source)(pretrained=False, **given)
        convert(model, settings)
        return model

    def build(**given: Any) -> nn.Module:
        arguments.update(given)
        model = whitened(requested, given)
        if fused:
            fuse_in_place(model)
        model._model_args = dict(getattr(model, "own_arguments", {}))
        read_other_forms(model)
        return model

    def without_data(settings: Any, others: dict[str, Any]) -> nn.Module:
        given = {key: value for key, value in arguments.items() if key not in ("device", "global_pool")}
        if "aux_head" not in given:
            others.pop("aux_head", None)
        with torch.device("meta"):
            return whitened(settings, {**given, **others})

    def transferred(state_dict: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        return transferred_weights(state_dict, model, source, arguments, keep_affine)

    kwargs["pretrained_filter_fn"] = checkpoint_filter(without_data, requested, transferred=transferred)
    model = build_model(build, name, pretrained, source=source, feature_cfg=dict(feature_cfg), **kwargs)
    for action in _when_transferred if share_notices(model).uncalibrated else ():
        action(model)
    return model


def build_model(
    build: Callable[..., nn.Module], name: str, pretrained: bool, *, source: str | None = None, **kwargs: Any
) -> nn.Module:
    """Build a network by timm's builder, which reads its weights where they are asked for.

    Raises:
        InputError: a file of weights that cannot be read, or is another one than its checksum says.
    """
    cfg = kwargs.get("pretrained_cfg")
    where = cfg.get("file") or cfg.get("hf_hub_id") if isinstance(cfg, Mapping) else None
    with readable(f"the file of weights of {where or name}"):
        model = build_model_with_cfg(build, name, pretrained, **kwargs)
    saved = kwargs.get("pretrained_model_args") or {}
    model._model_args = {**saved, **getattr(model, "_model_args", {})}  # timm's factory adds the user's
    if pretrained:
        check_recorded(model.pretrained_cfg, kwargs.get("cache_dir"))
    else:
        said = kwargs.get("pretrained_cfg_overlay") or {}
        model.pretrained_cfg = model.default_cfg = without_weights(model.pretrained_cfg, source) | said
    return model


_when_transferred: list[Callable[[nn.Module], object]] = []


def when_transferred(action: Callable[[nn.Module], object]) -> None:
    """Let `action` be called with every network that is created with batch-norm weights, before its creator has it.

    `python -m timm_deconv --calibrate` does so, as the script that it runs knows nothing of this package.
    """
    _when_transferred.append(action)


def _check_counts(arguments: Mapping[str, Any]) -> None:
    for name, least in (("num_classes", 0), ("in_chans", 1)):
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name}={value!r}: it is a whole number, {least} at least")


# Configurations and tags of the weights

PRE_NORM_MODULES = ("densenet", "dpn", "resnetv2")
"""Of timm: batch norms stand before the convolutions, behind sums and concatenations, and cannot be folded exactly."""

POST_NORM_WEIGHTS = """Tags `.bn_*` are weights of the batch-norm network, each norm folded into the layer before it.
    In evaluation the function is the batch-norm network's. Training whitens by its batches, and starts from another
    function unless `timm_deconv.calibrate(model, loader)` comes first, or the script is run by
    `python -m timm_deconv --calibrate DATA SCRIPT.py`."""
PRE_NORM_WEIGHTS = """The batch-norm network's weights have no tag here: its norms stand before the convolutions, and
    those behind sums and concatenations cannot be folded exactly. `timm_deconv.transfer(network, keep_affine=True)`
    transfers the weights and leaves such a norm's scale and shift in place."""

_OF_THE_NAME = ("architecture", "tag")


def default_cfg(source: str) -> dict[str, Any]:
    """Return a registered network's default_cfg (input size, mean and so on) without its name and its weights."""
    cfg = get_pretrained_cfg(source)
    assert cfg is not None
    left_out = ("url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load", *_OF_THE_NAME)
    left_out += ("label_names", "label_descriptions", "notes")
    return {key: value for key, value in cfg.to_dict().items() if key not in left_out and value is not None}


def _deconv_cfgs(name: str, source: str) -> dict[str, Mapping[str, Any]]:
    """Return the configurations of `name` with each tag of its own and of the source, or of `name` alone."""
    own = dict(entry_cfgs(name, default_cfg(source)))
    of_the_source = {}
    if not _is_pre_norm(source):
        for cfg in get_arch_pretrained_cfgs(source).values():  # the default first
            if cfg.tag and cfg.has_weights:
                kept = {key: value for key, value in cfg.to_dict().items() if key not in _OF_THE_NAME}
                of_the_source[f"{name}.{TAG_PREFIX}{cfg.tag}"] = kept
    return {**own, **{key: cfg for key, cfg in of_the_source.items() if key not in own}} or {name: default_cfg(source)}


def _is_pre_norm(source: str) -> bool:
    package, _, module = model_entrypoint(source).__module__.rpartition(".")
    return package == "timm.models" and module in PRE_NORM_MODULES


def _about_weights(source: str) -> str:
    if _is_pre_norm(source):
        return PRE_NORM_WEIGHTS
    return POST_NORM_WEIGHTS if any(cfg.has_weights for cfg in get_arch_pretrained_cfgs(source).values()) else ""
