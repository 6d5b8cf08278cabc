"""Changes of a network in place: layers replaced wherever they stand, batch norms taken out, classes extended."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_deconv.layers import ChannelDeconv, Deconv2d, Deconv2dSame, DeconvCfg, DeconvLinear, WhiteningMixin

from .roles import LINEAR_TYPES

__all__ = [
    "SelfFusing",
    "extend_class",
    "fuse_in_place",
    "is_whitened",
    "remove_norms",
    "replace_module",
    "take_over_reparameterization",
    "whitened_form",
    "why_not_whitened",
    "write_out_of_place",
    "writes_in_place",
]

CONVOLUTIONS: dict[type[nn.Module], type[Deconv2d]] = {nn.Conv2d: Deconv2d, Conv2dSame: Deconv2dSame}
NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORM_ACT_TYPES = (BatchNormAct2d, SyncBatchNormAct)
WHITENING_TYPES = WhiteningMixin | ChannelDeconv


# Layers


def why_not_whitened(layer: nn.Module) -> str | None:
    """Why a layer has no whitening form, or None if it has one."""
    kind = type(layer)
    if isinstance(layer, WhiteningMixin):
        return "whitened already"
    if kind not in CONVOLUTIONS and kind not in LINEAR_TYPES:
        return f"{kind.__name__} has no whitening form"
    if layer._parameters.get("weight") is None:
        return f"the weight of this {kind.__name__} is computed by a hook"
    return None


def whitened_form(layer: nn.Module, cfg: DeconvCfg) -> Deconv2d | DeconvLinear:
    """The whitening layer with the layer's own parameters."""
    if isinstance(layer, nn.Conv2d):
        return CONVOLUTIONS[type(layer)].from_conv(layer, cfg)
    assert isinstance(layer, nn.Linear)
    return DeconvLinear.from_linear(layer, cfg)


def is_whitened(model: nn.Module) -> bool:
    """Whether any layer whitens, that is, whether the network is not fused."""
    return any(isinstance(module, WHITENING_TYPES) for module in model.modules())


def fuse_in_place(model: nn.Module) -> None:
    """Put the plain layer in the place of every whitening layer below `model`."""
    fused: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if isinstance(child, WHITENING_TYPES):
                parent._modules[key] = fused.setdefault(id(child), child.fuse())


# Norms


def remove_norms(model: nn.Module) -> tuple[list[str], list[tuple[str, str]]]:
    """Take the batch norms out; an activation that belongs to one stays.

    Returns:
        names of those taken out; (name, class) of those left, whose class may do more than normalise.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    removed, left = [], []
    for name, norm in norms:
        if type(norm) in NORM_TYPES + NORM_ACT_TYPES:
            replace_module(model, norm, _without_norm(norm))
            removed.append(name)
        else:
            left.append((name, type(norm).__name__))
    return removed, left


def _without_norm(norm: nn.Module) -> nn.Module:
    """What a norm does beside normalising: timm's drop layer and activation."""
    parts = [getattr(norm, name, None) for name in ("drop", "act")] if type(norm) in NORM_ACT_TYPES else []
    kept = [part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
    alone = kept[0] if len(kept) == 1 else nn.Sequential(*kept) if kept else nn.Identity()
    return alone.train(norm.training)


def write_out_of_place(model: nn.Module) -> None:
    """Let no activation write in place: what it overwrites may be shared once the norm before it is gone."""
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]


def writes_in_place(model: nn.Module) -> bool:
    """Whether any activation writes in place."""
    return any(getattr(module, "inplace", False) is True for module in model.modules())


# Structure


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place where `old` stands: a module may be used more than once."""
    for parent, key in list(_places(model, old)):
        parent._modules[key] = new


def _places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is module:
                yield parent, key


class Extended(nn.Module):
    """Mixed into the class of a module in place; such modules copy and pickle."""

    if TYPE_CHECKING:  # at run time TorchScript would compile what is annotated here
        _classes: tuple[type[nn.Module], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, self._classes, self.__dict__


class SelfFusing(Extended):
    """A module that timm would re-parameterise by folding batch norms, which are gone: whitening is folded instead.

    Branches stay branches. `timm.utils.reparameterize_model` calls whichever of the three methods it finds first.
    """

    def fuse(self) -> nn.Module:
        """Fold the whitening of all layers below into plain ones, in place, and return the module."""
        fuse_in_place(self)
        return self

    def reparameterize(self) -> None:
        """As `fuse`."""
        fuse_in_place(self)

    def switch_to_deploy(self) -> None:
        """As `fuse`."""
        fuse_in_place(self)


def take_over_reparameterization(model: nn.Module) -> None:
    """Replace `fuse`, `reparameterize` and `switch_to_deploy` of the modules that whitened layers are part of."""
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    for module in model.modules():
        own = any(callable(getattr(type(module), name, None)) for name in methods)
        if own and not isinstance(module, SelfFusing | WHITENING_TYPES):
            extend_class(module, SelfFusing)


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
