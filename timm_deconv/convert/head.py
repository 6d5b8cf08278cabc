"""A converted timm network: it is saved as such, and a new classifier is whitened as the policy says."""

from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from .bn_folding import ChannelAffine
from .fuse import SelfFusing, folding_methods, fused_form, override_folding
from .module_replace import (
    extend_class,
    remove_norms,
    replace_modules,
    whitened_form,
    why_not_whitened,
    write_out_of_place,
    writes_in_place,
)
from .module_types import batch_norms, is_whitened
from .policy import DeconvPolicy
from .roles import classifier_names, linear_layers_as_convs

__all__ = ["GENERIC_NAME", "ConvertedNetwork", "extend_network"]

GENERIC_NAME = "deconv"
"""timm's name for what a conversion makes of any of its networks; `base` names the network."""


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
        """Make a new classifier as the network's own method does, whitened by the policy and without batch norms."""
        fused, in_place, staying = not is_whitened(self), writes_in_place(self), batch_norms(self).keys()
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
        self._whiten_classifier(fused)
        methods = folding_methods(self)
        remove_norms(self, batch_norms(self).keys() - staying)
        if not in_place:
            write_out_of_place(self)
        override_folding(methods)

    def _whiten_classifier(self, fused: bool) -> None:
        if self.deconv_policy.classifier != "linear":
            return
        convs = linear_layers_as_convs(self)
        for name in classifier_names(self):
            plain = self.get_submodule(name)
            cfg = self.deconv_policy.cfg(name, "classifier", linear_as_conv=name in convs)
            if cfg is not None and why_not_whitened(plain) is None:
                layer = whitened_form(plain, cfg)
                replace_modules(self, {plain: fused_form(layer) if fused else layer})

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


def extend_network(model: nn.Module, requested: DeconvPolicy, policy: DeconvPolicy) -> None:
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
