"""What modules are by their class: layers with a weight matrix, whitening layers, batch norms and other norms."""

from collections.abc import Iterator
from typing import TypeAlias, TypeGuard

from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]

from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv, WhiteningMixin

__all__ = [
    "FROZEN_TYPES",
    "NORM_ACT_TYPES",
    "WHITENING_TYPES",
    "BatchNorm",
    "batch_norms",
    "check_network",
    "frozen_norms",
    "is_any_norm",
    "is_batch_norm",
    "is_whitened",
    "weighted_layers",
]

WHITENING_TYPES = WhiteningMixin | ChannelDeconv

NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORM_ACT_TYPES = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
"""Norms of timm with an activation of their own."""

FROZEN_TYPES = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
"""Batch norms that are a fixed scale and shift in training too: torchvision's, and what timm's `freeze` makes."""

BatchNorm: TypeAlias = _BatchNorm | FrozenBatchNormAct2d
"""Their common attributes are those of torchvision's frozen norm, which says nothing of its types."""


def check_network(model: object, function: str) -> None:
    """Check that `function` was given a network whose layers have their shapes.

    Raises:
        InputError: it is no `nn.Module`, or holds a lazy layer that has seen no input.
    """
    if not isinstance(model, nn.Module):
        made = f"; timm.create_model({model!r}) makes a network" if isinstance(model, str) else ""
        raise InputError(f"{function}({model!r:.60}): it takes a network, an nn.Module{made}")
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise InputError(
                f"{name or 'the network'} is a {type(module).__name__} without a shape yet: run the network once on a"
                " batch first"
            )


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of every layer with a weight matrix, in network order; one that is used twice comes once."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            yield name, module
        elif not isinstance(module, nn.Embedding | nn.EmbeddingBag) and "Norm" not in type(module).__name__:
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim > 1:
                yield name, module


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms that conversion can take out, by name: those that do nothing but what their class says."""
    types = NORM_TYPES + NORM_ACT_TYPES
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and type(m) in types}


def frozen_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Return the frozen batch norms by name."""
    return {name: module for name, module in model.named_modules() if type(module) in FROZEN_TYPES}


def is_any_norm(module: nn.Module) -> bool:
    """Return whether a module normalises, as far as its class says."""
    named = "Norm" in type(module).__name__ and bool(module._parameters or module._buffers)
    return named or isinstance(module, _BatchNorm)


def is_batch_norm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Return whether a module is a batch norm, frozen or not."""
    return isinstance(module, _BatchNorm | FrozenBatchNorm2d | FrozenBatchNormAct2d)


def is_whitened(model: nn.Module) -> bool:
    """Return whether any layer whitens; none does in a fused network."""
    return any(isinstance(module, WHITENING_TYPES) for module in model.modules())
