"""The whitening layers."""

from .base import WhiteningMixin
from .channel import ChannelDeconv
from .config import PRESETS, DeconvCfg, preset
from .conv import Deconv2d
from .linear import DeconvLinear

__all__ = ["PRESETS", "ChannelDeconv", "Deconv2d", "DeconvCfg", "DeconvLinear", "WhiteningMixin", "preset"]
