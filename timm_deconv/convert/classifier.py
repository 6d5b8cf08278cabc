"""The classifier of a converted network: of the policy's kind, and again so after `reset_classifier`."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import timm
from timm.layers import SelectAdaptivePool2d
from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv

from .affine import ChannelAffine
from .kinds import batch_norms
from .policy import DeconvPolicy
from .roles import classifier_names, linear_layers_as_convs
from .self_fusing import SelfFusing, own_methods, take_over
from .surgery import (
    extend_class,
    fused_form,
    is_whitened,
    remove_norms,
    replace_module,
    whitened_form,
    why_not_whitened,
    write_out_of_place,
    writes_in_place,
)

__all__ = ["GENERIC_NAME", "ConvertedNetwork", "WhitenedPool", "check_pooling", "mix_in", "whiten_pooling"]

GENERIC_NAME = "deconv"
"""timm's name for what a conversion makes of any of its networks; `base` names the network."""


class WhitenedPool(nn.Sequential):
    """Channel whitening in front of a global pooling; answers what timm asks of the pooling."""

    if TYPE_CHECKING:  # at run time TorchScript would compile what is annotated here
        whiten: nn.Module
        pool: SelectAdaptivePool2d

    def __init__(self, whiten: nn.Module, pool: SelectAdaptivePool2d) -> None:
        super().__init__(OrderedDict(whiten=whiten, pool=pool))
        self.pool_type = pool.pool_type

    def is_identity(self) -> bool:
        """Whether nothing is pooled."""
        return self.pool.is_identity()

    def feat_mult(self) -> int:
        """Channels after pooling, as a multiple of those before."""
        return self.pool.feat_mult()


class ConvertedNetwork(SelfFusing):
    """Mixed into the class of a converted timm network: timm saves it, and `reset_classifier` keeps the policy's kind.

    Attributes:
        deconv_policy: the policy that the layers were made by.
        requested_policy: the part of it that the user asked for, which is saved; the rest lies under it by name.
    """

    __jit_unused_properties__ = ("_model_args",)

    if TYPE_CHECKING:  # at run time TorchScript would compile what is annotated here
        deconv_policy: DeconvPolicy
        requested_policy: DeconvPolicy
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        fused, in_place = not is_whitened(self), writes_in_place(self)
        whiten = next((m.whiten for m in self.modules() if isinstance(m, WhitenedPool)), None)
        staying = batch_norms(self).keys()
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
        if self.deconv_policy.classifier == "channel":
            new = new_channel_whitening(self, self.deconv_policy)
            whiten_pooling(self, whiten or (new.fuse() if fused else new))
        self._whiten_classifier(fused)
        methods = own_methods(self)
        remove_norms(self, batch_norms(self).keys() - staying)
        if not in_place:
            write_out_of_place(self)
        take_over(methods)

    def _whiten_classifier(self, fused: bool) -> None:
        if self.deconv_policy.classifier != "linear":
            return
        convs = linear_layers_as_convs(self)
        for name in classifier_names(self):
            plain = self.get_submodule(name)
            cfg = self.deconv_policy.cfg(name, "classifier", linear_as_conv=name in convs)
            if cfg is not None and why_not_whitened(plain) is None:
                layer = whitened_form(plain, cfg)
                replace_module(self, plain, fused_form(layer) if fused else layer)

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm records to build the network again, with the policy by its full name."""
        args = {**self.__dict__.get("_recorded_args", {}), "deconv": self.requested_policy.to_dict()}
        if not is_whitened(self):
            args["fused"] = True
        if any(isinstance(module, ChannelAffine) for module in self.modules()):
            args["keep_affine"] = True
        return args

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        derived = ("deconv", "fused", "keep_affine")
        self.__dict__["_recorded_args"] = {key: value for key, value in args.items() if key not in derived}


def mix_in(model: nn.Module, requested: DeconvPolicy, policy: DeconvPolicy) -> None:
    """Make a timm network a `ConvertedNetwork` that is saved by the generic name; others are left as they are."""
    if not hasattr(model, "reset_classifier"):
        return
    args = getattr(model, "_model_args", {})
    extend_class(model, ConvertedNetwork)
    assert isinstance(model, ConvertedNetwork)
    model.deconv_policy, model.requested_policy = policy, requested
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict) and timm.is_model(cfg.get("architecture") or ""):
        model._model_args = {"base": cfg["architecture"], **args}
        model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": GENERIC_NAME}


def check_pooling(model: nn.Module) -> None:
    """Raise InputError for a network whose channels cannot be whitened in front of one global pooling."""
    if not isinstance(getattr(model, "num_features", None), int) or len(_pools(model)) != 1:
        raise InputError(
            f"{len(_pools(model))} global poolings in {type(model).__name__}: classifier='channel' needs one;"
            " use 'linear'"
        )


def whiten_pooling(model: nn.Module, whiten: nn.Module) -> None:
    """Put channel whitening in front of the network's global pooling; none where nothing is pooled."""
    ((name, pool),) = _pools(model)
    if not pool.is_identity() and not any(isinstance(m, WhitenedPool) for m in model.modules()):
        model.set_submodule(name, WhitenedPool(whiten, pool).train(pool.training))


def new_channel_whitening(model: nn.Module, policy: DeconvPolicy) -> ChannelDeconv:
    """Channel whitening of a network's features, on its device."""
    like = next(model.parameters())
    features: Any = model.num_features
    return ChannelDeconv(features, like.device, like.dtype, cfg=policy.channel_cfg())


def _pools(model: nn.Module) -> list[tuple[str, SelectAdaptivePool2d]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, SelectAdaptivePool2d)]
