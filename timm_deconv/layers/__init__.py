"""The whitening layers."""

from .channel import ChannelDeconv
from .config import DeconvCfg
from .conv import Deconv2d
from .linear import DeconvLinear
from .module import WhiteningMixin
from .presets import PRESETS, preset, resolve_cfg
from .same import Conv2dSame, Deconv2dSame

__all__ = [
    "PRESETS",
    "ChannelDeconv",
    "Conv2dSame",
    "Deconv2d",
    "Deconv2dSame",
    "DeconvCfg",
    "DeconvLinear",
    "WhiteningMixin",
    "preset",
    "resolve_cfg",
]
