"""From any network to a deconvolution network and back to a plain one."""

from .adapters import refuse_adapters
from .calibrate import calibrate
from .converter import convert_deconv_model
from .freezing import freeze, unfreeze
from .fuse import fuse
from .policy import DeconvPolicy, resolve_policy
from .report import ConversionReport
from .transfer import transfer
from .update_statistics import update_statistics

__all__ = [
    "ConversionReport",
    "DeconvPolicy",
    "calibrate",
    "convert_deconv_model",
    "freeze",
    "fuse",
    "resolve_policy",
    "transfer",
    "unfreeze",
    "update_statistics",
]

refuse_adapters()
