"""Methods that would fold batch norms away, which are gone: they fold whitening instead."""

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from .kinds import is_batch_norm
from .surgery import WHITENING_TYPES, Extended, extend_class, fuse_in_place

__all__ = ["SelfFusing", "own_methods", "take_over"]

METHODS = ("fuse", "reparameterize", "switch_to_deploy")
"""What `timm.utils.reparameterize_model` looks for."""

STATISTICS = ("running_mean", "running_var")
DEPTH = 3
"""How many calls deep a method is read."""

Methods = list[tuple[nn.Module, tuple[str, ...], tuple[str, ...]]]


class SelfFusing(Extended):
    """A module that would be re-parameterised by folding batch norms, which are gone: whitening is folded instead.

    Branches stay branches. `timm.utils.reparameterize_model` calls whichever of the three methods it finds first. A
    method of the module's own that does something else goes on doing it.
    """

    def fuse(self, *args: Any, **kwargs: Any) -> Any:
        """Fold the whitening of all layers below into plain ones, in place, and return the module."""
        return self._fuse_or("fuse", args, kwargs)

    def reparameterize(self, *args: Any, **kwargs: Any) -> Any:
        """As `fuse`."""
        return self._fuse_or("reparameterize", args, kwargs)

    def switch_to_deploy(self, *args: Any, **kwargs: Any) -> Any:
        """As `fuse`."""
        return self._fuse_or("switch_to_deploy", args, kwargs)

    def _fuse_or(self, method: str, args: Any, kwargs: Any) -> Any:
        if method in self.__dict__.get("_own_methods", ()):
            return getattr(super(), method)(*args, **kwargs)
        fuse_in_place(self)
        return self


def own_methods(model: nn.Module) -> Methods:
    """Modules with methods of these names, and the names: of those that fold batch norms away, and of the others.

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


def take_over(methods: Methods) -> None:
    """Let the modules that `own_methods` found fold whitened layers, if they hold any now; other methods stay."""
    for module, folding, others in methods:
        if folding and not isinstance(module, SelfFusing):
            if not any(isinstance(layer, WHITENING_TYPES) for layer in module.modules()):
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
    """The names in a function's code and in that of what it calls."""
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
