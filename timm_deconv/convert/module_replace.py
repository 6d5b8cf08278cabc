"""Changes of a network in place: modules replaced wherever they stand, batch norms taken out, classes extended."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from torch import nn

from timm_deconv.layers import Deconv2d, Deconv2dSame, DeconvCfg, DeconvLinear, WhiteningMixin

from .module_types import NORM_ACT_TYPES

__all__ = [
    "Extended",
    "extend_class",
    "keep_hooks",
    "remove_norms",
    "replace_modules",
    "whitened_form",
    "why_not_whitened",
    "write_out_of_place",
    "writes_in_place",
]

CONVOLUTIONS: dict[type[nn.Module], type[Deconv2d]] = {nn.Conv2d: Deconv2d, Conv2dSame: Deconv2dSame}
LINEAR_TYPES = (nn.Linear, TimmLinear)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[module]` in every place below `model` where a module stands: it may be used more than once."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[key] = new[child]


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let `new`, which is to stand in the place of `old`, call its hooks; the handles of these go on removing them."""
    for name, hooks in vars(old).items():
        if "_hooks" in name and hooks and vars(new).get(name):
            vars(new)[name].update(hooks)
        elif "_hooks" in name and hooks:
            vars(new)[name] = hooks
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook


# Layers


def why_not_whitened(layer: nn.Module) -> str | None:
    """Return why a layer has no whitening form, or None if it has one."""
    kind = type(layer)
    if isinstance(layer, WhiteningMixin):
        return "whitened already"
    if kind not in CONVOLUTIONS and kind not in LINEAR_TYPES:
        return f"{kind.__name__} has no whitening form"
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            return f"the {name} of this {kind.__name__} is computed by a hook"
    if "forward" in vars(layer):
        return f"the forward of this {kind.__name__} was replaced"
    held = {**layer._parameters, **layer._buffers, **layer._modules}.keys() - {"weight", "bias"}
    if held:
        return f"this {kind.__name__} holds {', '.join(sorted(held))} beside weight and bias"
    return None


def whitened_form(layer: nn.Module, cfg: DeconvCfg) -> Deconv2d | DeconvLinear:
    """Make the whitening layer of a layer that has one, with its own parameters, hooks and the user's attributes."""
    new: Deconv2d | DeconvLinear
    if isinstance(layer, nn.Conv2d):
        new = CONVOLUTIONS[type(layer)].from_conv(layer, cfg)
    else:
        assert isinstance(layer, nn.Linear)
        new = DeconvLinear.from_linear(layer, cfg)
    keep_hooks(layer, new)
    for key in vars(layer).keys() - vars(new).keys():
        setattr(new, key, getattr(layer, key))
    return new


# Norms


def remove_norms(model: nn.Module, names: Iterable[str]) -> None:
    """Take the batch norms of these names out; an activation that belongs to one stays, and so do hooks."""
    norms = [model.get_submodule(name) for name in names]
    replace_modules(model, {norm: _without_norm(norm) for norm in norms})


def _without_norm(norm: nn.Module) -> nn.Module:
    """Return what a norm does beside normalising, timm's drop layer and activation, with its hooks."""
    parts = [getattr(norm, name, None) for name in ("drop", "act")] if type(norm) in NORM_ACT_TYPES else []
    kept = [part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
    left = kept[0] if len(kept) == 1 else nn.Sequential(*kept) if kept else nn.Identity()
    keep_hooks(norm, left)
    return left.train(norm.training)


def write_out_of_place(model: nn.Module) -> None:
    """Let no activation write in place: what it overwrites may be shared once the norm before it is gone."""
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]


def writes_in_place(model: nn.Module) -> bool:
    """Return whether any activation writes in place."""
    return any(getattr(module, "inplace", False) is True for module in model.modules())


# Classes


class Extended(nn.Module):
    """Mixed into the class of a module in place; such modules copy and pickle."""

    if TYPE_CHECKING:  # at run time TorchScript would compile what is annotated here
        _classes: tuple[type[nn.Module], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, self._classes, self.__dict__


def extend_class(module: nn.Module, mixin: type[Extended]) -> None:
    """Make a module an instance of a class between its own and `mixin`, in place."""
    module.__class__ = _extended_class(mixin, type(module))


_EXTENDED: dict[tuple[type, type], type[nn.Module]] = {}


def _extended_class(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    if (mixin, cls) not in _EXTENDED:
        own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_classes": (mixin, cls)}
        _EXTENDED[mixin, cls] = type(cls.__name__, (mixin, cls), own)
    return _EXTENDED[mixin, cls]


def _new(mixin: type[nn.Module], cls: type[nn.Module]) -> nn.Module:
    extended = _extended_class(mixin, cls)
    return extended.__new__(extended)
