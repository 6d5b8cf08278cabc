"""The weights that training starts from: what timm is asked for, and whether it has taken all of a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_name, model_entrypoint
from torch import Tensor, nn

from timm_deconv.convert.roles import classifier_names
from timm_deconv.errors import InputError
from timm_deconv.layers import WhiteningMixin
from timm_deconv.models.remap import remap_by_order
from timm_deconv.models.weights import read_weights

from .recipe import Recipe

__all__ = ["check_loaded", "pretrained_arguments"]


def pretrained_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return `timm.create_model`'s arguments for the weights that training starts from.

    Raises:
        InputError: no such file, or one whose tensors have names that the network does not know and another order.
    """
    if recipe.pretrained_path is None:
        return {"pretrained": recipe.pretrained}
    file = _weights_file(recipe.pretrained_path)
    weights = read_weights(file)
    named = _named(recipe, weights)
    overlay: dict[str, Any] = {"file": str(file)} if named is weights else {"state_dict": named}
    if (classes := _classes(recipe, named)) is not None:
        overlay["num_classes"] = classes
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def check_loaded(recipe: Recipe, model: nn.Module) -> None:
    """Check that a file held every weight of a plain timm network but the classifier's, and drop it from its settings.

    timm reads a classifier of another size loosely: whatever else is missing would go on with random weights.

    Raises:
        InputError: the file lacks tensors.
    """
    if recipe.pretrained_path is None or any(isinstance(module, WhiteningMixin) for module in model.modules()):
        return  # the filter of our own networks has checked it
    if (cfg := model.pretrained_cfg).get("state_dict"):
        model.pretrained_cfg = model.default_cfg = {k: v for k, v in cfg.items() if k != "state_dict"}
        return  # by order all are there
    weights = read_weights(_weights_file(recipe.pretrained_path))
    ignored = tuple(f"{name}." for name in classifier_names(model))
    missing = sorted(key for key in model.state_dict().keys() - weights.keys() if not key.startswith(ignored))
    if missing := [key for key in missing if not key.endswith("num_batches_tracked")]:
        raise InputError(
            f"pretrained_path={recipe.pretrained_path!r} lacks {len(missing)} tensors of {recipe.model} ({missing[0]},"
            " ...); name a file of this network's weights"
        )


def _named(recipe: Recipe, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors as the network does, by their order where no name is known; return them as they are otherwise.

    In this package's own networks the filter of their weights does so.
    """
    if model_entrypoint(get_arch_name(recipe.model)).__module__.startswith("timm_deconv."):
        return weights
    cfg = timm.get_pretrained_cfg(recipe.model)
    described = {"num_classes": cfg.num_classes, "in_chans": cfg.input_size[0]}
    with torch.device("meta"):
        expected = timm.create_model(recipe.model, **{**recipe.model_kwargs, **described}).state_dict()
    if expected.keys() & weights.keys():
        return weights
    try:
        return remap_by_order(weights, expected)
    except InputError as error:
        raise InputError(
            f"pretrained_path={recipe.pretrained_path!r} does not fit {recipe.model}: no name is known, and by order"
            f" {error}"
        ) from None


def _classes(recipe: Recipe, weights: Mapping[str, Tensor]) -> int | None:
    """Count the outputs of the classifier in weights by the network's names; None where it has none by that name."""
    cfg = timm.get_pretrained_cfg(recipe.model)
    names = cfg.classifier if isinstance(cfg.classifier, tuple | list) else (cfg.classifier,)
    found = (weights[f"{name}.weight"].shape[0] for name in names if f"{name}.weight" in weights)
    return next(found, None)


def _weights_file(path: str) -> Path:
    return Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
