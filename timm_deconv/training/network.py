"""The network of a recipe: made by timm with the arguments and weights that the recipe names."""

import inspect
import re
import textwrap

import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from timm_deconv.convert import freeze, unfreeze
from timm_deconv.convert.roles import classifier_names
from timm_deconv.errors import InputError, unknown_name
from timm_deconv.models import list_models

from .initial_weights import check_loaded, pretrained_arguments
from .recipe import Recipe

__all__ = ["create_model"]


def create_model(recipe: Recipe) -> nn.Module:
    """Create the recipe's network with its initial weights, and freeze what the recipe freezes.

    Raises:
        InputError: an unknown model or argument of it, with the nearest names, a value that it does not take, or
            weights that do not fit.
    """
    if not timm.is_model(recipe.model):
        raise unknown_name("model", recipe.model, timm.list_models())
    kwargs = {"num_classes": recipe.num_classes, "in_chans": recipe.input_size[0], **recipe.model_kwargs}
    if recipe.model_kwargs:
        _check_arguments(recipe, kwargs)
    model = timm.create_model(recipe.model, **pretrained_arguments(recipe), **kwargs)
    check_loaded(recipe, model)
    if recipe.head_init_scale is not None:
        _scale_classifier(model, recipe.head_init_scale)
    if recipe.freeze_bn:
        freeze_batch_norm_2d(model)
    if recipe.freeze_backbone:
        freeze(model)
        unfreeze(model, list(classifier_names(model)))
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


@torch.no_grad()
def _scale_classifier(model: nn.Module, scale: float) -> None:
    for name in classifier_names(model):
        for parameter in model.get_submodule(name).parameters():
            parameter.mul_(scale)


def _check_arguments(recipe: Recipe, kwargs: dict[str, object]) -> None:
    """Make the network without weights or storage, and turn what timm says of its arguments into one line."""
    given = recipe.model_kwargs
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            timm.create_model(recipe.model, **kwargs)
    except InputError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in given:
            raise unknown_name(f"argument of {recipe.model}", unknown[1], _known_arguments(recipe.model)) from None
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        raise InputError(f"{recipe.model} cannot be made with model_kwargs={given}: {reason}") from error


def _known_arguments(model: str) -> set[str]:
    """Collect the arguments of the constructors that make a network, and those of its entry point."""
    with torch.device("meta"):
        classes = type(timm.create_model(model)).__mro__
    constructors = [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls) and cls is not nn.Module]
    parameters = [each for made in constructors for each in list(inspect.signature(made).parameters.values())[1:]]
    named = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    return named | ({"deconv", "fused"} if model.partition(".")[0] in list_models() else set())
