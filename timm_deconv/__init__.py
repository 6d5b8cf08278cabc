"""Network deconvolution (Ye et al., ICLR 2020) as a timm plugin: importing this package registers its models with timm."""

from .convert import DeconvPolicy, convert_deconv_model, fuse
from .layers import ChannelDeconv, Deconv2d, DeconvCfg, DeconvLinear
from .models import list_models

__version__ = "0.1.0"

__all__ = [
    "ChannelDeconv",
    "Deconv2d",
    "DeconvCfg",
    "DeconvLinear",
    "DeconvPolicy",
    "convert_deconv_model",
    "fuse",
    "list_models",
]
