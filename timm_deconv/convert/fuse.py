"""Whitening layers become plain ones: in a copy by `fuse`, in place by methods that would fold batch norms."""

import copy
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv, WhiteningMixin

from .module_replace import Extended, extend_class, keep_hooks, replace_modules
from .module_types import WHITENING_TYPES, check_network, is_batch_norm, is_whitened

__all__ = ["SelfFusing", "folding_methods", "fuse", "fuse_in_place", "fused_form", "override_folding"]


def fuse(model: nn.Module) -> nn.Module:
    """Copy a network, in evaluation mode, with plain layers that compute the same in place of its whitening layers.

    `Deconv2d` becomes `nn.Conv2d`, `DeconvLinear` `nn.Linear`, `ChannelDeconv` a 1x1 convolution. The model itself is
    unchanged and can go on training. A fused timm network saves and loads as the original does.

    Hooks, memory format and `requires_grad` are kept. Parametrisations are folded in.

    Raises:
        InputError: no whitening layer, or one whose parameters are computed by hooks, such as pruned layers.
    """
    check_network(model, "fuse")
    if not is_whitened(model):
        raise InputError(
            f"no whitening layer in {type(model).__name__}, so nothing to fuse: a fused network has none, and"
            " convert_deconv_model makes them"
        )
    _check_parameters(model)
    plain = copy.deepcopy(model).eval()
    if isinstance(plain, WHITENING_TYPES):
        return fused_form(plain)
    fuse_in_place(plain)
    return plain


def fuse_in_place(model: nn.Module) -> None:
    """Put the plain layer in the place of every whitening layer below `model`."""
    layers = [module for module in model.modules() if module is not model and isinstance(module, WHITENING_TYPES)]
    replace_modules(model, {layer: fused_form(layer) for layer in layers})


def fused_form(layer: WhiteningMixin | ChannelDeconv) -> nn.Module:
    """Make the plain layer that computes what a whitening layer does, with its hooks, memory format and flags."""
    plain = layer.fuse()
    keep_hooks(layer, plain)
    for name, parameter in plain.named_parameters(recurse=False):
        source = layer._parameters.get(name)
        if source is None:
            continue
        parameter.requires_grad_(source.requires_grad)
        if source.ndim == 4 and source.is_contiguous(memory_format=torch.channels_last):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return plain


def _check_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, WhiteningMixin) and not hasattr(module, "parametrizations"):
            for key in {"weight", "bias"} - module._parameters.keys():
                raise InputError(
                    f"the {key} of {name or 'this layer'} is computed by a hook: make it permanent before fusing, as"
                    f" torch.nn.utils.prune.remove(layer, {key!r}) does"
                )


# Methods of the network that fold batch norms

METHODS = ("fuse", "reparameterize", "switch_to_deploy")
"""What `timm.utils.reparameterize_model` looks for."""

STATISTICS = ("running_mean", "running_var")
DEPTH = 3
"""How many calls deep a method is read."""

Methods = list[tuple[nn.Module, tuple[str, ...], tuple[str, ...]]]


class SelfFusing(Extended):
    """A module whose methods would fold batch norms, which are gone: whitening is folded instead.

    Branches stay branches. `timm.utils.reparameterize_model` calls whichever of the three methods it finds first. A
    method of the module's own that does something else goes on doing it.
    """

    def fuse(self, *args: Any, **kwargs: Any) -> Any:
        """Fold the whitening of all layers below into plain ones, in place, and return the module."""
        return self._fuse_or("fuse", args, kwargs)

    def reparameterize(self, *args: Any, **kwargs: Any) -> Any:
        """Do as `fuse`."""
        return self._fuse_or("reparameterize", args, kwargs)

    def switch_to_deploy(self, *args: Any, **kwargs: Any) -> Any:
        """Do as `fuse`."""
        return self._fuse_or("switch_to_deploy", args, kwargs)

    def _fuse_or(self, method: str, args: Any, kwargs: Any) -> Any:
        if method in self.__dict__.get("_own_methods", ()):
            return getattr(super(), method)(*args, **kwargs)
        fuse_in_place(self)
        return self


def folding_methods(model: nn.Module) -> Methods:
    """Find the modules with methods of these names: (module, those that fold batch norms away, the others).

    Such a method needs no arguments, and is timm's or reads batch norms: their running statistics, or the attributes
    that hold them in the module.
    """
    found = []
    for module in model.modules():
        cls = type(module)
        own = [name for name in METHODS if callable(getattr(cls, name, None))]
        if own and not isinstance(module, SelfFusing | WHITENING_TYPES):
            norms = {key for m in module.modules() for key, child in m.named_children() if is_batch_norm(child)}
            folding = tuple(name for name in own if _folds_norms(getattr(cls, name), cls, norms))
            found.append((module, folding, tuple(name for name in own if name not in folding)))
    return found


def override_folding(methods: Methods) -> None:
    """Let the modules that `folding_methods` found fold their whitened layers, if they hold any now.

    Methods that fold no batch norms stay the module's own.
    """
    for module, folding, others in methods:
        if folding and not isinstance(module, SelfFusing):
            if not is_whitened(module):
                continue
            extend_class(module, SelfFusing)
        if others and isinstance(module, SelfFusing):
            module.__dict__["_own_methods"] = others


def _folds_norms(method: Any, owner: type, norms: set[str]) -> bool:
    method = inspect.unwrap(method)
    if not inspect.isfunction(method):
        return False
    parameters = list(inspect.signature(method).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return False
    return method.__module__.startswith("timm.") or not norms.union(STATISTICS).isdisjoint(_names(method, owner))


def _names(function: Any, owner: type, depth: int = DEPTH) -> Iterator[str]:
    """Yield the names in a function's code and in that of what it calls."""
    for name in _names_in(function.__code__):
        yield name
        called = inspect.unwrap(function.__globals__.get(name, getattr(owner, name, None)))
        if depth > 1 and name != "forward" and inspect.isfunction(called):
            yield from _names(called, owner, depth - 1)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
