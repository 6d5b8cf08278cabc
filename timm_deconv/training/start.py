"""The weights that training starts from: what timm is asked for, and whether it has taken all of a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from timm_deconv.convert.roles import classifier_names
from timm_deconv.errors import InputError
from timm_deconv.layers import WhiteningMixin
from timm_deconv.models.weights import read_weights

from .recipe import Recipe

__all__ = ["check_loaded", "start_arguments"]


def start_arguments(recipe: Recipe) -> dict[str, Any]:
    """`timm.create_model`'s arguments for the weights that training starts from."""
    if recipe.pretrained_path is None:
        return {"pretrained": recipe.pretrained}
    file = _weights_file(recipe.pretrained_path)
    overlay: dict[str, Any] = {"file": str(file)}
    if (classes := _classes(recipe, read_weights(file))) is not None:
        overlay["num_classes"] = classes
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _classes(recipe: Recipe, weights: Mapping[str, Tensor]) -> int | None:
    """Outputs of the classifier in a file of weights for the recipe's network; None where it has none by that name."""
    cfg = timm.get_pretrained_cfg(recipe.model)
    names = cfg.classifier if isinstance(cfg.classifier, tuple | list) else (cfg.classifier,)
    found = (weights[f"{name}.weight"].shape[0] for name in names if f"{name}.weight" in weights)
    return next(found, None)


def check_loaded(recipe: Recipe, model: nn.Module) -> None:
    """timm reads a classifier of another size loosely: whatever else is missing would go on with random weights."""
    if recipe.pretrained_path is None or any(isinstance(module, WhiteningMixin) for module in model.modules()):
        return  # the filter of our own networks has checked it
    weights = read_weights(_weights_file(recipe.pretrained_path))
    own = tuple(f"{name}." for name in classifier_names(model))
    missing = sorted(key for key in model.state_dict().keys() - weights.keys() if not key.startswith(own))
    if missing := [key for key in missing if not key.endswith("num_batches_tracked")]:
        raise InputError(
            f"pretrained_path={recipe.pretrained_path!r} lacks {len(missing)} tensors of {recipe.model} ({missing[0]},"
            " ...); name a file of this network's weights"
        )


def _weights_file(path: str) -> Path:
    return Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
