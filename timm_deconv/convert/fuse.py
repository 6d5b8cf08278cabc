"""fuse: fold whitening away for inference."""

import copy

from torch import nn

from timm_deconv.errors import InputError

from .kinds import check_network
from .surgery import WHITENING_TYPES, check_fusible, fuse_in_place, fused_form, is_whitened

__all__ = ["fuse"]


def fuse(model: nn.Module) -> nn.Module:
    """A copy of the network, in evaluation mode, whose whitening layers are plain layers that compute the same.

    `Deconv2d` becomes `nn.Conv2d`, `DeconvLinear` `nn.Linear`, `ChannelDeconv` a 1x1 convolution. The model itself is
    unchanged and can go on training. timm saves and loads the copy of one of its networks as it does the network.

    Hooks, memory format and `requires_grad` are kept. Parametrisations are folded in.

    Raises:
        InputError: no whitening layer, or one whose parameters are computed by hooks, as of pruned layers.
    """
    check_network(model, "fuse")
    if not is_whitened(model):
        raise InputError(
            f"no whitening layer in {type(model).__name__}, so nothing to fuse: a fused network has none, and"
            " convert_deconv_model makes them"
        )
    check_fusible(model)
    plain = copy.deepcopy(model).eval()
    if isinstance(plain, WHITENING_TYPES):
        return fused_form(plain)
    fuse_in_place(plain)
    return plain
