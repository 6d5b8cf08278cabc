"""Registration of the deconvolution networks: a row a model, one function that makes the entry points.

timm (or the family's module) builds the batch-norm network, the converter changes its layers, and timm's builder
goes on with weights and feature extraction as for any of its own models.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

from timm.layers import register_notrace_module
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from torch import nn

from timm_deconv.convert import DeconvPolicy, convert_deconv_model
from timm_deconv.convert.fuse import fuse_in_place
from timm_deconv.convert.policy import SMALL_BATCH_DEFAULTS, as_saved
from timm_deconv.layers import ChannelDeconv, Conv2dSame, Deconv2d, Deconv2dSame, DeconvLinear

from ._blocks import check_counts
from ._checkpoints import TAG_PREFIX, checkpoint_filter, refuse_other_forms
from ._created import created
from ._packages import packaged_weights

__all__ = ["CIFAR_POLICY", "IMAGENET_POLICY", "frozen_stem", "list_models", "register_deconv"]

for _layer in (Deconv2d, Deconv2dSame, DeconvLinear, ChannelDeconv, Conv2dSame):
    register_notrace_module(_layer)

CIFAR_POLICY = DeconvPolicy(roles={"classifier": {"block": 512}})
"""Under the preset 'paper', the 32x32 networks of the paper's Table 1: published behaviour throughout."""

IMAGENET_POLICY = SMALL_BATCH_DEFAULTS
"""Under the preset 'paper', ImageNet networks and converted ones: layers that see fewer rows than features are kept in
bounds."""

# Where nothing is published at ImageNet scale, a family's networks take the exceptions of its 32x32 network.

Family = DeconvPolicy | Callable[[nn.Module], DeconvPolicy]

PRE_NORM_MODULES = ("densenet", "dpn", "resnetv2")
"""Of timm: batch norms stand before the convolutions, behind sums and concatenations, and cannot be folded exactly."""

POST_NORM_WEIGHTS = """Tags `.bn_*` are weights of the batch-norm network, each norm folded into the layer before it.
    In evaluation the function is the batch-norm network's. Training whitens by its batches, and starts from another
    function unless `timm_deconv.calibrate(model, loader)` comes first, or the script is run by
    `python -m timm_deconv --calibrate DATA SCRIPT.py`."""
PRE_NORM_WEIGHTS = """The batch-norm network's weights have no tag here: its norms stand before the convolutions, and
    those behind sums and concatenations cannot be folded exactly. `timm_deconv.transfer(network, keep_affine=True)`
    carries the weights over and leaves such a norm's scale and shift in place."""

_REGISTERED: list[str] = []
_OF_THE_NAME = ("architecture", "tag")


def frozen_stem(family: DeconvPolicy, n_iter: int) -> DeconvPolicy:
    """A family's policy whose first layer freezes after 101 forwards and takes `n_iter` steps."""
    return DeconvPolicy(roles={"stem": {"freeze": True, "n_iter": n_iter}}).over(family)


def list_models() -> list[str]:
    """Names of all registered deconvolution networks."""
    return sorted(_REGISTERED)


def register_deconv(
    module: str,
    sources: Mapping[str, Family],
    *,
    feature_cfg: Mapping[str, Any] | None = None,
    in_place: bool = False,
) -> None:
    """Register `<source>_deconv` (without a `_bn` of the source's name) for each batch-norm network and its family
    policy.

    Args:
        module: `__name__` of the family's module, which gets the entry points and `default_cfgs`.
        sources: name of a registered batch-norm network -> its published settings, or a function of the batch-norm
            network that gives them where they depend on its channels.
        feature_cfg: how `features_only=True` works, as in timm's builder.
        in_place: every norm stands directly behind a convolution; see `convert_deconv_model`.
    """
    namespace = sys.modules[module]
    rows = [
        _Row(f"{source.removesuffix('_bn')}_deconv", source, family, feature_cfg or {}, in_place)
        for source, family in sources.items()
    ]
    cfgs = generate_default_cfgs({key: cfg for row in rows for key, cfg in _cfgs(row.name, row.source)})
    namespace.default_cfgs = {**getattr(namespace, "default_cfgs", {}), **cfgs}  # type: ignore[attr-defined]
    for row in rows:
        setattr(namespace, row.name, register_model(_entry_point(module, row)))
        _REGISTERED.append(row.name)


class _Row(NamedTuple):
    """A registered network: its name, the batch-norm network that it is made of, and how."""

    name: str
    source: str
    family: Family
    feature_cfg: Mapping[str, Any]
    in_place: bool


def _entry_point(module: str, row: _Row) -> Callable[..., nn.Module]:
    name, source, family, feature_cfg, in_place = row

    def entry_point(pretrained: bool = False, *, deconv: Any = None, fused: bool = False, **kwargs: Any) -> nn.Module:
        check_counts(kwargs)
        arguments: dict[str, Any] = {}

        def build(**given: Any) -> nn.Module:
            arguments.update(given)
            model = model_entrypoint(source)(pretrained=False, **given)
            settings = family if isinstance(family, DeconvPolicy) else family(model)
            policy = as_saved(deconv, kwargs.get("pretrained_model_args"))
            convert_deconv_model(model, policy, family=settings, in_place=in_place)
            return as_built(model, fused)

        tag = kwargs.get("pretrained_cfg") or ""
        from_package = pretrained and isinstance(tag, str)  # else the user describes the weights
        with (
            packaged_weights(source, tag.removeprefix(TAG_PREFIX), kwargs)
            if from_package
            else nullcontext(kwargs) as options
        ):
            model = build_model_with_cfg(
                build,
                name,
                pretrained,
                feature_cfg=dict(feature_cfg),
                pretrained_filter_fn=checkpoint_filter(source, arguments),
                **options,
            )
        return created(model)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f"""{source} with every convolution and the classifier whitened and no batch norm.

    `deconv` is a preset's name, a dictionary over a preset, or a `DeconvPolicy`; `fused=True` makes the plain network
    that `timm_deconv.fuse` makes of it, for its weights; other arguments as in `timm.create_model`.

    {_about_weights(source)}
    """
    return entry_point


def as_built(model: nn.Module, fused: bool) -> nn.Module:
    """A converted network as timm's builder wants it: fused if asked for, no arguments but its own recorded yet."""
    if fused:
        fuse_in_place(model)
    model._model_args = dict(getattr(model, "own_arguments", {}))  # type: ignore[assignment, arg-type]
    refuse_other_forms(model)
    return model


def default_cfg(source: str) -> dict[str, Any]:
    """The source's input size, mean and so on, without its weights."""
    cfg = get_pretrained_cfg(source)
    assert cfg is not None
    left_out = ("url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load", *_OF_THE_NAME)
    return {key: value for key, value in cfg.to_dict().items() if key not in left_out and value is not None}


def _cfgs(name: str, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`name` with each tag of the source and where its weights are, the default first; else `name` without weights."""
    tagged = [cfg for cfg in get_arch_pretrained_cfgs(source).values() if cfg.tag and cfg.has_weights]
    if _is_pre_norm(source) or not tagged:
        yield name, default_cfg(source)
        return
    for cfg in tagged:
        kept = {key: value for key, value in cfg.to_dict().items() if key not in _OF_THE_NAME}
        yield f"{name}.{TAG_PREFIX}{cfg.tag}", kept


def _is_pre_norm(source: str) -> bool:
    package, _, module = model_entrypoint(source).__module__.rpartition(".")
    return package == "timm.models" and module in PRE_NORM_MODULES


def _about_weights(source: str) -> str:
    if _is_pre_norm(source):
        return PRE_NORM_WEIGHTS
    return POST_NORM_WEIGHTS if any(cfg.has_weights for cfg in get_arch_pretrained_cfgs(source).values()) else ""
