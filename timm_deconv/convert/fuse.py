"""fuse: fold whitening away for inference."""

import copy

from torch import nn

from timm_deconv.layers import ChannelDeconv, WhiteningMixin

from .surgery import fuse_in_place

__all__ = ["fuse"]


def fuse(model: nn.Module) -> nn.Module:
    """A copy of the network, in evaluation mode, whose whitening layers are plain layers that compute the same.

    `Deconv2d` becomes `nn.Conv2d`, `DeconvLinear` `nn.Linear`, `ChannelDeconv` a 1x1 convolution. The model itself is
    unchanged and can go on training. timm saves and loads the copy of one of its networks as it does the network.
    """
    plain = copy.deepcopy(model).eval()
    if isinstance(plain, WhiteningMixin | ChannelDeconv):
        return plain.fuse()
    fuse_in_place(plain)
    return plain
