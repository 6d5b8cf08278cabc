"""Adapters that are merged into a weight, such as PEFT's LoRA, are refused around whitening layers.

They compute `base(x) + B A x` and write B A into the weight of `base`. A whitening layer's weight acts on the whitened
x, so that merging would change the function, and the copy of the layer's class that they make for A would whiten too.
"""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from timm_deconv.errors import InputError

from .module_types import WHITENING_TYPES

__all__ = ["refuse_adapters"]


def refuse_adapters() -> None:
    """Refuse from now on, with an InputError, that a module that can `merge` takes a whitening layer as `base_layer`.

    That is PEFT's name for the layer that an adapter changes.
    """
    register_module_module_registration_hook(_check)


def _check(parent: nn.Module, name: str, child: Any) -> None:
    if name == "base_layer" and isinstance(child, WHITENING_TYPES) and callable(getattr(type(parent), "merge", None)):
        raise InputError(
            f"an adapter ({type(parent).__name__}) around a {type(child).__name__}: merged, it would add to a weight"
            " that acts on whitened inputs; adapt the plain network that timm_deconv.fuse(model) makes"
        )
