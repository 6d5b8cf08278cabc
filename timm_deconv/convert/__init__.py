"""From any network to a deconvolution network and back to a plain one."""

from .adapters import refuse_adapters
from .calibrate import calibrate
from .converter import convert_deconv_model
from .fuse import fuse
from .policy import DeconvPolicy, resolve_policy
from .report import ConversionReport
from .transfer import transfer

__all__ = [
    "ConversionReport",
    "DeconvPolicy",
    "calibrate",
    "convert_deconv_model",
    "fuse",
    "resolve_policy",
    "transfer",
]

refuse_adapters()
