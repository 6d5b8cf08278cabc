"""Registration of the batch-norm networks in timm: a row a model, one function that makes the entry points."""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ._blocks import check_counts
from ._checkpoints import batch_norm_filter

CheckpointFilter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)

CIFAR_CFG: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "num_classes": 10,
    "mean": CIFAR10_MEAN,
    "std": CIFAR10_STD,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "classifier": "head.fc",
    "license": "apache-2.0",
}
"""What a 32x32 network's default_cfg says unless the family says otherwise."""

SEGMENTATION_CFG: dict[str, Any] = {
    "input_size": (3, 513, 513),
    "pool_size": (65, 65),
    "num_classes": 21,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "license": "apache-2.0",
}
"""The same for dense prediction; `pool_size` is the size of the encoder's map."""

STAGED_FEATURES: dict[str, Any] = {"flatten_sequential": True}
"""How timm takes the feature maps of a `StagedNet`: its stages are one sequence deep."""


def register_twins(
    module: str,
    model_cls: Callable[..., nn.Module],
    table: Mapping[str, Mapping[str, Any]],
    *,
    base_cfg: Mapping[str, Any] = CIFAR_CFG,
    feature_cfg: Mapping[str, Any] = STAGED_FEATURES,
    filter_fn: CheckpointFilter | None = None,
    **cfg: Any,
) -> None:
    """Register each name of `table` with timm, and set the entry points and `default_cfgs` in `module`.

    Args:
        module: `__name__` of the family's module.
        model_cls: builds the network from a row's arguments and the user's.
        table: model name -> constructor arguments that make it.
        base_cfg: default_cfg shared by all families of a kind.
        feature_cfg: how `features_only=True` works: arguments of timm's `FeatureListNet`, levels 0 to 4 by default.
        filter_fn: (state dict, model) -> state dict, applied to pretrained weights.
        cfg: fields of `timm.models.PretrainedCfg` in which the family differs from `base_cfg`.
    """
    namespace = sys.modules[module]
    namespace.default_cfgs = generate_default_cfgs({name: {**base_cfg, **cfg} for name in table})  # type: ignore[attr-defined]
    for name, arguments in table.items():
        entry_point = _entry_point(module, name, model_cls, arguments, feature_cfg, filter_fn)
        setattr(namespace, name, register_model(entry_point))


def _entry_point(
    module: str,
    name: str,
    model_cls: Callable[..., nn.Module],
    arguments: Mapping[str, Any],
    feature_cfg: Mapping[str, Any],
    filter_fn: CheckpointFilter | None,
) -> Callable[..., nn.Module]:
    def entry_point(
        pretrained: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        check_counts(kwargs)
        built_with: dict[str, Any] = {}

        def build(**given: Any) -> nn.Module:
            built_with.update(given)
            return model_cls(**given)

        with nullcontext() if device is None else torch.device(device):
            model = build_model_with_cfg(
                build,
                name,
                pretrained,
                feature_cfg=dict(feature_cfg),
                pretrained_filter_fn=batch_norm_filter(model_cls, built_with, filter_fn),
                **{**arguments, **kwargs},
            )
        return model.to(dtype=dtype)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f"{name}: batch-norm form; arguments as in `timm.create_model`."
    return entry_point
