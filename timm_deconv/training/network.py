"""The network of a recipe: made by timm with the arguments and weights that the recipe names."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from timm_deconv.convert import freeze, unfreeze
from timm_deconv.convert.roles import classifier_names
from timm_deconv.errors import InputError, unknown_name
from timm_deconv.models import list_models
from timm_deconv.models.deeplabv3 import SegmentationNet
from timm_deconv.models.pretrained import batch_norm_name
from timm_deconv.models.segmenter import create_encoder
from timm_deconv.models.weights import packaged_weights

from .initial_weights import check_loaded, pretrained_arguments
from .recipe import Recipe

__all__ = ["create_model", "create_segmentation_model"]

FOR_ENCODERS = ("deconv",)
"""What `model_kwargs` may hold where the network becomes an encoder."""


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
    with _weights_named(recipe):
        model = timm.create_model(recipe.model, **pretrained_arguments(recipe), **kwargs)
    check_loaded(recipe, model)
    if recipe.head_init_scale is not None:
        _scale_classifier(model, recipe.head_init_scale)
    if recipe.freeze_bn:
        freeze_batch_norm_2d(model)
    if recipe.freeze_backbone:
        freeze(model)
        unfreeze(model, list(classifier_names(model)))
    return _laid_out(model, recipe)


def create_segmentation_model(recipe: Recipe) -> nn.Module:
    """Create the recipe's network for dense prediction, which may be any of timm's as the encoder of a `Segmenter`.

    An encoder that starts from weights computes the same in both forms; the head is new.

    Raises:
        InputError: see `create_model`; or what cannot be set for an encoder.
    """
    if not timm.is_model(recipe.model):
        raise unknown_name("model", recipe.model, timm.list_models())
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        if isinstance(timm.create_model(recipe.model), SegmentationNet):
            return create_model(recipe)
    if unknown := recipe.model_kwargs.keys() - set(FOR_ENCODERS):
        raise unknown_name("argument (model_kwargs) of an encoder", min(unknown), FOR_ENCODERS)
    if recipe.freeze_backbone:
        raise InputError("freeze_backbone would leave the head of a segmenter untrained; leave it out")
    return _segmenter(recipe)


def _segmenter(recipe: Recipe) -> nn.Module:
    base = batch_norm_name(recipe.model)
    deconv = recipe.model_kwargs.get("deconv", {} if recipe.model != base else None)
    channels = recipe.input_size[0]
    model = timm.create_model("segmenter", base=base, num_classes=recipe.num_classes, in_chans=channels)
    if trained := recipe.pretrained or recipe.pretrained_path:
        model.encoder = _trained_encoder(recipe.merged({"model": base, "model_kwargs": {}}))
    if recipe.freeze_bn and deconv is None:
        freeze_batch_norm_2d(model.encoder)
    if deconv is not None:
        model.whiten(deconv, recipe.input_size if trained else None)
    if recipe.head_init_scale is not None:
        _scale_classifier(model, recipe.head_init_scale)
    return _laid_out(model, recipe)


def _laid_out(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Let the network save or keep activations, in the memory format that the recipe says."""
    if recipe.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):  # timm's way of refusing
            raise InputError(f"grad_checkpointing: {recipe.model} has no blocks to run twice; leave it out") from None
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def _trained_encoder(recipe: Recipe) -> nn.Module:
    """Create the recipe's batch-norm network as an encoder with its weights, which a package may hold."""
    with packaged_weights(recipe.model, {}) as found:
        file = found.get("pretrained_cfg_overlay", {}).get("file")
        if file and not recipe.pretrained_path:
            recipe = recipe.merged({"pretrained_path": file})
        with _weights_named(recipe):
            encoder = create_encoder(recipe.model, in_chans=recipe.input_size[0], **pretrained_arguments(recipe))
    check_loaded(recipe, encoder)
    return encoder


@contextmanager
def _weights_named(recipe: Recipe) -> Iterator[None]:
    """Say whose weights the Hub's client could not get."""
    try:
        yield
    except OSError as error:
        if not recipe.pretrained or recipe.pretrained_path:
            raise
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        raise InputError(f"weights of {recipe.model} cannot be had ({reason}); give pretrained_path") from error


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
