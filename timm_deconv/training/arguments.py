"""Whether a network takes the arguments that a recipe has for it, asked of one without storage."""

import inspect
import re
import textwrap
from collections.abc import Iterator

import timm
import torch
from torch import nn

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.models import list_models

from .recipe import Recipe

__all__ = ["check_arguments"]


def check_arguments(recipe: Recipe) -> None:
    """Make the recipe's network without weights or storage.

    Raises:
        InputError: an argument in `model_kwargs` that it does not have, with the nearest names, or a value that it does
            not take.
    """
    given = recipe.model_kwargs
    if not given:
        return
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            timm.create_model(recipe.model, num_classes=recipe.num_classes, in_chans=recipe.input_size[0], **given)
    except InputError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in given:
            raise unknown_name(f"argument of {recipe.model}", unknown[1], _names(recipe.model)) from None
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        raise InputError(f"{recipe.model} cannot be made with model_kwargs={given}: {reason}") from error


def _names(model: str) -> set[str]:
    """Arguments of the constructors that make a network, and of its name."""
    with torch.device("meta"):
        network = timm.create_model(model)
    own = {"deconv", "fused"} if model.partition(".")[0] in list_models() else set()
    return own | set(_constructor_arguments(network))


def _constructor_arguments(network: nn.Module) -> Iterator[str]:
    for cls in type(network).__mro__:
        if "__init__" not in vars(cls) or cls is nn.Module:
            continue
        for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                yield parameter.name
