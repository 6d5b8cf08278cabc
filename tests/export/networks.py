"""Small networks whose whitening is no identity."""

import copy
from typing import Any

import timm
import torch
from torch import nn


def trained(name: str, images: torch.Tensor | None = None, **arguments: Any) -> nn.Module:
    """Create a network that has seen one batch, so that whitening or norms have statistics; in training mode."""
    model = timm.create_model(name, **arguments).train()
    size = model.pretrained_cfg["input_size"]
    with torch.no_grad():
        model(torch.randn(8, *size) * 0.5 + 0.2 if images is None else images)
    return model


def small() -> nn.Module:
    """Create a network of a few layers for images of 64 x 64."""
    return of_size(trained("deconv", torch.randn(8, 3, 64, 64), base="test_resnet", num_classes=10), 64)


def of_size(model: nn.Module, size: int) -> nn.Module:
    """Let a network's configuration ask for images of another size."""
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    return model


def evaluated(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what a copy of a network gives in evaluation."""
    with torch.inference_mode():
        return copy.deepcopy(model).eval()(images)
