"""From any network to a deconvolution network and back to a plain one."""

from .adapters import refuse_adapters
from .calibrate import calibrate
from .converter import ConversionReport, convert_deconv_model
from .fuse import fuse
from .policy import DeconvPolicy, resolve_policy
from .statistics import freeze, kept_buffers, unfreeze, update_statistics
from .synchronise import convert_sync
from .transfer import transfer

__all__ = [
    "ConversionReport",
    "DeconvPolicy",
    "calibrate",
    "convert_deconv_model",
    "convert_sync",
    "freeze",
    "fuse",
    "kept_buffers",
    "resolve_policy",
    "transfer",
    "unfreeze",
    "update_statistics",
]

refuse_adapters()
