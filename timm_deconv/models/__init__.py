"""The networks of the paper; importing this package registers them with timm."""

from . import (  # noqa: F401 (they register their networks)
    deeplabv3,
    densenet,
    dpn,
    efficientnet,
    generic,
    mobilenetv2,
    pnasnet,
    preact_resnet,
    resnet,
    resnext,
    segmenter,
    senet,
    vgg,
)
from .registration import list_models

__all__ = ["list_models"]
