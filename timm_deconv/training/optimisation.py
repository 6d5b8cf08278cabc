"""Optimiser and schedule of a recipe, which are timm's, and the clipping of its gradients."""

import inspect
import math
import textwrap
from typing import Any

import torch
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import adaptive_clip_grad, dispatch_clip_grad
from torch import nn

from timm_deconv.errors import InputError, unknown_name

from .lr_scale import scaled_param_groups
from .recipe import Recipe

__all__ = ["clip_gradients", "create_optimizer", "create_scheduler"]

REFUSED = (TypeError, ValueError, AssertionError, RuntimeError, ImportError)
"""What timm and torch raise at arguments that make no sense."""


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Create timm's optimiser of the recipe.

    Raises:
        InputError: `opt_kwargs` or another setting is none of the optimiser's, or a package that it needs is missing.
    """
    scaled = scaled_param_groups(
        recipe.weight_decay, recipe.filter_bias_and_bn, layers=recipe.layer_rates, auxiliary=recipe.aux_lr_scale
    )
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            filter_bias_and_bn=recipe.filter_bias_and_bn,
            layer_decay=recipe.layer_decay,
            param_group_fn=scaled if recipe.layer_rates or recipe.aux_lr_scale != 1 else None,
            **recipe.opt_kwargs,
        )
    except REFUSED as error:
        given = f" with opt_kwargs={recipe.opt_kwargs}" if recipe.opt_kwargs else ""
        raise InputError(f"opt={recipe.opt!r} cannot be made{given}: {_shortened(error)}") from error


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, batches: int) -> Scheduler:
    """Create timm's schedule of the recipe over all its updates, at its first value, for so many batches an epoch.

    Raises:
        InputError: `sched_kwargs` are none of the schedule's.
    """
    settings: dict[str, Any] = {
        "sched": recipe.sched,
        "decay_rate": recipe.decay_rate,
        "num_epochs": recipe.epochs,
        "warmup_epochs": recipe.warmup_epochs,
        "warmup_lr": recipe.warmup_lr,
        "min_lr": recipe.min_lr,
        "step_on_epochs": False,
        "updates_per_epoch": math.ceil(batches / recipe.grad_accum_steps),
    }
    known = inspect.signature(create_scheduler_v2).parameters.keys() - settings.keys() - {"optimizer"}
    if unknown := recipe.sched_kwargs.keys() - known:
        raise unknown_name("argument (sched_kwargs) of timm's schedules", min(unknown), known)
    try:
        scheduler, _ = create_scheduler_v2(optimizer, **settings, **recipe.sched_kwargs)
    except REFUSED as error:
        raise InputError(
            f"sched={recipe.sched!r} cannot be made with sched_kwargs={recipe.sched_kwargs}: {_shortened(error)}"
        ) from error
    return scheduler


def clip_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, bound: float, mode: str) -> None:
    """Clip the gradients of a network, as the recipe's `clip_grad` and `clip_mode` say.

    Args:
        model: not wrapped.
        optimizer: of its parameters. The adaptive mode bounds the step whatever a group's own rate.
        bound, mode: of the recipe.
    """
    if mode != "agc":
        dispatch_clip_grad(model.parameters(), bound, mode)
        return
    clipped = set(model_parameters(model, exclude_head=True))
    for group in optimizer.param_groups:
        adaptive_clip_grad(clipped.intersection(group["params"]), bound / group.get("lr_scale", 1.0))


def _shortened(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
