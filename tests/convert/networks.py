"""Small networks for the converter's tests, each with one trait that matters to it."""

from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from timm_deconv.convert import ConversionReport, convert_deconv_model


class Tiny(nn.Module):
    """Stem, depthwise, grouped, pointwise and a classifier; norms of three kinds."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = BatchNormAct2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.bn3 = BatchNormAct2d(16, apply_act=False)
        self.head = nn.Linear(16, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.stem(x)))
        x = self.bn2(self.depthwise(x))
        x = self.bn3(self.pointwise(self.grouped(x)))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """Pre-norm residual block whose activation works in place, a layer used twice and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.conv
        self.tied = nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(self.act(self.norm(x)))
        return x + self.again(x) + self.tied(x)


def images(batch: int = 4, size: int = 12) -> Tensor:
    return torch.randn(batch, 3, size, size)


def converted(name: str, policy: Any = None, **kwargs: Any) -> tuple[nn.Module, ConversionReport]:
    """A timm network, converted, and the report."""
    model = timm.create_model(name, **kwargs)
    return model, convert_deconv_model(model, policy)


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """After one training forward, so that its statistics are not at their start, in evaluation mode."""
    model.train()
    with torch.no_grad():
        model(x)
    return model.eval()
