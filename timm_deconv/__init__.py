"""Network deconvolution (Ye et al., ICLR 2020) as a timm plugin: importing it registers the models with timm."""

from .convert import (
    DeconvPolicy,
    calibrate,
    convert_deconv_model,
    convert_sync,
    freeze,
    fuse,
    kept_buffers,
    transfer,
    unfreeze,
    update_statistics,
)
from .layers import ChannelDeconv, Deconv2d, DeconvCfg, DeconvLinear
from .models import list_models

__version__ = "0.1.0"

__all__ = [
    "ChannelDeconv",
    "Deconv2d",
    "DeconvCfg",
    "DeconvLinear",
    "DeconvPolicy",
    "calibrate",
    "convert_deconv_model",
    "convert_sync",
    "freeze",
    "fuse",
    "kept_buffers",
    "list_models",
    "transfer",
    "unfreeze",
    "update_statistics",
]
