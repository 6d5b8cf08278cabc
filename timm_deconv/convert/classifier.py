"""The classifier of a converted network: of the policy's kind, and again so after `reset_classifier`."""

from collections import OrderedDict
from functools import cache
from typing import Any

from timm.layers import SelectAdaptivePool2d
from torch import nn

from ..errors import InputError
from ..layers import ChannelDeconv, DeconvLinear
from .policy import DeconvPolicy
from .roles import classifier_names

__all__ = ["ConvertedNetwork", "WhitenedPool", "mix_in", "whiten_pooling"]


class WhitenedPool(nn.Sequential):
    """Channel whitening in front of a global pooling; answers what timm asks of the pooling."""

    def __init__(self, whiten: ChannelDeconv, pool: SelectAdaptivePool2d) -> None:
        super().__init__(OrderedDict(whiten=whiten, pool=pool))
        self.pool_type = pool.pool_type

    def is_identity(self) -> bool:
        """Whether nothing is pooled."""
        return self.pool.is_identity()

    def feat_mult(self) -> int:
        """Channels after pooling, as a multiple of those before."""
        return self.pool.feat_mult()


class ConvertedNetwork(nn.Module):
    """Mixed into the class of a converted network: it keeps the policy, and `reset_classifier` makes a classifier of its kind.

    Attributes:
        deconv_policy: the policy that the layers were made by.
        requested_policy: the part of it that the user asked for, which is saved; the rest is the registered name's own.
    """

    __jit_unused_properties__ = ("_model_args",)

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        whiten = next((m.whiten for m in self.modules() if isinstance(m, WhitenedPool)), None)
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
        if whiten is not None:
            whiten_pooling(self, whiten)
        for name in classifier_names(self):
            classifier = self.get_submodule(name)
            cfg = self.deconv_policy.cfg(name, "classifier") if self.deconv_policy.classifier == "linear" else None
            if cfg is not None and type(classifier) is nn.Linear:
                self.set_submodule(name, DeconvLinear.from_linear(classifier, cfg))

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm records to build the network again, with the policy by its full name."""
        return self.__dict__.get("_recorded_args", {})

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self.__dict__["_recorded_args"] = {**args, "deconv": self.requested_policy.to_dict()}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (type(self).__mro__[2],), self.__dict__


def mix_in(model: nn.Module, policy: DeconvPolicy) -> None:
    """Make a timm network a `ConvertedNetwork`, in place; others are left as they are."""
    if hasattr(model, "reset_classifier") and not isinstance(model, ConvertedNetwork):
        model.__class__ = _converted_class(type(model))
    model.deconv_policy = model.requested_policy = policy  # type: ignore[assignment]


def whiten_pooling(model: nn.Module, whiten: ChannelDeconv) -> None:
    """Put a channel whitening in front of the network's global pooling; none where nothing is pooled."""
    pools = [(name, m) for name, m in model.named_modules() if isinstance(m, SelectAdaptivePool2d)]
    if len(pools) != 1:
        raise InputError(f"{len(pools)} global poolings in {type(model).__name__}: classifier='channel' needs one; use 'linear'")
    name, pool = pools[0]
    if not pool.is_identity():
        model.set_submodule(name, WhitenedPool(whiten, pool))


@cache
def _converted_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (ConvertedNetwork, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _new(cls: type[nn.Module]) -> nn.Module:
    converted = _converted_class(cls)
    return converted.__new__(converted)
