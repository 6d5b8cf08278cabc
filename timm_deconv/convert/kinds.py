"""What modules are by their class: layers with a weight matrix, batch norms, frozen batch norms and other norms."""

from collections.abc import Iterator
from typing import TypeAlias, TypeGuard

from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers import Linear as TimmLinear
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]

from timm_deconv.errors import InputError

__all__ = [
    "FROZEN_TYPES",
    "LINEAR_TYPES",
    "NORM_ACT_TYPES",
    "NORM_TYPES",
    "BatchNorm",
    "batch_norms",
    "check_network",
    "frozen_norms",
    "is_any_norm",
    "is_batch_norm",
    "is_transposed",
    "other_norms",
    "weighted_layers",
]

LINEAR_TYPES = (nn.Linear, TimmLinear)
"""The classes whose instances are linear layers and nothing more."""

NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORM_ACT_TYPES = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
"""Norms of timm with an activation of their own."""

FROZEN_TYPES = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
"""Batch norms that are a fixed scale and shift in training too: torchvision's, and what timm's `freeze` makes."""

BatchNorm: TypeAlias = _BatchNorm | FrozenBatchNormAct2d
"""Their common attributes are those of torchvision's frozen norm, which says nothing of its types."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that conversion takes out, by name; one that is used twice is named once."""
    return {name: module for name, module in model.named_modules() if _goes(module)}


def frozen_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The frozen batch norms by name."""
    return {name: module for name, module in model.named_modules() if type(module) in FROZEN_TYPES}


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer with a weight matrix, in network order; one that is used twice comes once."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            yield name, module
        elif not isinstance(module, nn.Embedding | nn.EmbeddingBag) and "Norm" not in type(module).__name__:
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim > 1:
                yield name, module


def other_norms(model: nn.Module) -> list[tuple[str, str]]:
    """(name, class) of the normalisation layers that are not torch's batch norms: LayerNorm, EvoNorm and so on."""
    return [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if is_any_norm(module) and not isinstance(module, _BatchNorm)
    ]


def is_any_norm(module: nn.Module) -> bool:
    """Whether a module normalises, as far as its class says."""
    named = "Norm" in type(module).__name__ and bool(module._parameters or module._buffers)
    return named or isinstance(module, _BatchNorm)


def is_batch_norm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module is a batch norm, frozen or not."""
    return isinstance(module, _BatchNorm | FrozenBatchNorm2d | FrozenBatchNormAct2d)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is a transposed convolution."""
    return isinstance(module, _ConvTransposeNd)


def check_network(model: object, function: str) -> None:
    """Raise InputError for what is no network, or one whose layers have no shape yet."""
    if not isinstance(model, nn.Module):
        made = f"; timm.create_model({model!r}) makes a network" if isinstance(model, str) else ""
        raise InputError(f"{function}({model!r:.60}): it takes a network, an nn.Module{made}")
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise InputError(
                f"{name or 'the network'} is a {type(module).__name__} without a shape yet: run the network once on a"
                " batch first"
            )


def _goes(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and type(module) in NORM_TYPES + NORM_ACT_TYPES
