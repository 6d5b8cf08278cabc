"""Learning rates by layer for fine-tuning: every whitened layer takes steps in proportion to its own size.

The weight of a layer behind a batch norm has no scale of its own: if its rows had norm 1, a step of the optimiser would
turn it by the rate times the gradient. A whitened layer's weight has one, and after batch norms were folded into it and
the inverse whitener was absorbed (`timm_deconv.calibrate`) it is that of the layer's output: in MobileNetV2, calibrated
on CIFAR-10, mean squared row norms lie between 0.01 and 5, so that one rate turns some layers hundreds of times as fast
as others. Multiplied by the mean squared norm of its rows, a layer's rate turns it as if the rows had norm 1.
"""

import math
from collections.abc import Callable
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn

from timm_deconv.convert.roles import classifier_names
from timm_deconv.layers import WhiteningMixin
from timm_deconv.models.checkpoints import AUXILIARY

__all__ = ["layer_lr_scales", "scaled_param_groups"]

Groups = list[dict[str, Any]]


def layer_lr_scales(model: nn.Module) -> dict[str, float]:
    """Return what the rate is multiplied by for each whitened layer, by the name of its weight.

    A layer's scale is the mean squared norm of its rows. The classifier is the exception, as no norm stands behind it
    in batch-norm networks either: with weight w and whitener D, a step of SGD moves the folded weight w D by D^2 times
    the gradient, and the mean eigenvalue of D^2 divides that out.
    """
    classifiers = classifier_names(model)
    return {
        f"{name}.weight": _classifier_scale(layer) if name in classifiers else _row_scale(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, WhiteningMixin)
    }


def scaled_param_groups(
    weight_decay: float, exclude_1d: bool, *, layers: bool = True, auxiliary: float = 1.0
) -> Callable[[nn.Module], Groups]:
    """Make a `param_group_fn` for timm: its groups, and more with an `lr_scale` for parameters of a rate of their own.

    Args:
        weight_decay: of the groups.
        exclude_1d: no decay of biases and other vectors.
        layers: scale the rate of each whitened layer's weight; for optimisers whose step is proportional to the
            gradient (SGD), as others make up for its size themselves. Its decay is divided by its scale, so that a
            weight loses the same share at every step as without: EfficientNet-Lite0's first layers, of squared norms
            near 1,000, would be gone in an epoch.
        auxiliary: scales the rate of heads that only training uses.
    """

    def groups(model: nn.Module) -> Groups:
        sizes = layer_lr_scales(model) if layers else {}
        scales = {
            parameter: (sizes.get(name, 1.0), auxiliary if name.startswith(AUXILIARY) else 1.0)
            for name, parameter in model.named_parameters()
            if name in sizes or name.startswith(AUXILIARY)
        }
        made: Groups = []
        for group in param_groups_weight_decay(model, weight_decay, weight_decay_exclude_1d=exclude_1d):
            plain = [parameter for parameter in group["params"] if parameter not in scales]
            made += [{**group, "params": plain}] if plain else []
            for parameter in group["params"]:
                if scale := scales.get(parameter):
                    own = {"lr_scale": math.prod(scale), "weight_decay": group["weight_decay"] / scale[0]}
                    made.append({**group, "params": [parameter], **own})
        return made

    return groups


def _row_scale(layer: WhiteningMixin) -> float:
    size = layer.weight.detach().flatten(1).square().sum(1).mean().item()
    return size or 1.0  # a branch that starts at zero has to leave it


def _classifier_scale(layer: WhiteningMixin) -> float:
    return 1 / layer.running_deconv.square().sum(-1).mean().item()
