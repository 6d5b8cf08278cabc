"""Batch-norm networks as training might leave them, and how far outputs are apart."""

from typing import Any

import timm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NARROW: dict[str, Any] = {"channels": (16, 32, 64, 128)}
"""A quarter of the usual widths: every layer is there, and loading takes a third of the time."""


def randomised(name: str, **options: Any) -> nn.Module:
    """A batch-norm network in evaluation with statistics and affine weights as training might leave them."""
    model = timm.create_model(name, **options)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
