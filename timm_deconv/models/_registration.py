"""Registration of the deconvolution networks: a row a model, one function that makes the entry points.

timm (or the family's module) builds the batch-norm network, the converter changes its layers, and timm's builder goes on with
weights and feature extraction as for any of its own models.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, model_entrypoint, register_model
from torch import Tensor, nn

from ..convert import DeconvPolicy, convert_deconv_model, resolve_policy
from ..layers import ChannelDeconv, Deconv2d, DeconvLinear

__all__ = ["CIFAR_POLICY", "IMAGENET_POLICY", "frozen_stem", "list_models", "register_deconv"]

for _layer in (Deconv2d, DeconvLinear, ChannelDeconv):
    register_notrace_module(_layer)

CIFAR_POLICY = DeconvPolicy(roles={"classifier": {"block": 512}})
"""The 32x32 networks of the paper's Table 1: published behaviour throughout."""

IMAGENET_POLICY = DeconvPolicy(options={"min_rows": 1.0})
"""ImageNet networks and converted ones: layers that see fewer rows than features are kept in bounds."""

_REGISTERED: list[str] = []


def frozen_stem(family: DeconvPolicy, n_iter: int) -> DeconvPolicy:
    """A family's policy whose first layer freezes after 101 forwards and takes `n_iter` steps."""
    return DeconvPolicy(roles={"stem": {"freeze": True, "n_iter": n_iter}}).over(family)


def list_models() -> list[str]:
    """Names of all registered deconvolution networks."""
    return sorted(_REGISTERED)


def register_deconv(
    module: str, sources: Mapping[str, DeconvPolicy], *, feature_cfg: Mapping[str, Any] | None = None
) -> None:
    """Register `<source>_deconv` (without a `_bn` of the source's name) for each batch-norm network and its family policy.

    Args:
        module: `__name__` of the family's module, which gets the entry points and `default_cfgs`.
        sources: name of a registered batch-norm network -> its published settings.
        feature_cfg: how `features_only=True` works, as in timm's builder.
    """
    namespace = sys.modules[module]
    rows = {f"{source.removesuffix('_bn')}_deconv": (source, policy) for source, policy in sources.items()}
    cfgs = generate_default_cfgs({name: _default_cfg(source) for name, (source, _) in rows.items()})
    namespace.default_cfgs = {**getattr(namespace, "default_cfgs", {}), **cfgs}  # type: ignore[attr-defined]
    for name, (source, policy) in rows.items():
        setattr(namespace, name, register_model(_entry_point(module, name, source, policy, feature_cfg or {})))
        _REGISTERED.append(name)


def _entry_point(
    module: str, name: str, source: str, family: DeconvPolicy, feature_cfg: Mapping[str, Any]
) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, deconv: Any = None, **kwargs: Any) -> nn.Module:
        requested = resolve_policy(deconv)

        def build(**arguments: Any) -> nn.Module:
            model = model_entrypoint(source)(pretrained=False, **arguments)
            convert_deconv_model(model, requested.over(family))
            model.requested_policy = requested
            model._model_args = {}
            return model

        return build_model_with_cfg(
            build, name, pretrained, feature_cfg=dict(feature_cfg), pretrained_filter_fn=checkpoint_filter, **kwargs
        )

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f"""{source} with every convolution and the classifier whitened and no batch norm.

    `deconv` is a preset's name, a dictionary over a preset, or a `DeconvPolicy`; other arguments as in `timm.create_model`.
    """
    return entry_point


def _default_cfg(source: str) -> dict[str, Any]:
    """The source's input size, mean and so on, without its weights."""
    cfg = get_pretrained_cfg(source)
    assert cfg is not None
    weights = ("url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "tag", "architecture", "source", "custom_load")
    return {key: value for key, value in cfg.to_dict().items() if key not in weights and value is not None}


def checkpoint_filter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Make a deconvolution checkpoint fit a network of other input channels or without a classifier.

    A stem of other input channels gets the folded weight, which timm adapts, and starts from identity whitening; so a
    network made for one channel gives on grey pictures what the checkpoint gives on their copies in three channels.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Deconv2d)}
    for name, layer in layers.items():
        mean = state_dict.get(f"{name}.running_mean")
        if mean is not None and mean.shape != layer.running_mean.shape:
            state_dict = {**state_dict, **_refolded(name, layer, state_dict)}
    known = model.state_dict()
    statistics = ("running_mean", "running_deconv", "num_batches_tracked")
    return {key: value for key, value in state_dict.items() if key in known or not key.endswith(statistics)}


def _refolded(name: str, layer: Deconv2d, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight = state_dict[f"{name}.weight"]
    source = Deconv2d(
        weight.shape[1] * layer.groups, layer.out_channels, layer.kernel_size, groups=layer.groups, cfg=layer.cfg  # type: ignore[arg-type]
    )
    prefix = f"{name}."
    source.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
    folded, bias = (value.detach() for value in source.folded())
    fresh = {f"{prefix}{key}": value for key, value in layer.state_dict().items() if key not in ("weight", "bias")}
    return {f"{prefix}weight": folded, f"{prefix}bias": bias, **fresh}
