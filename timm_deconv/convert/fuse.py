"""fuse: fold whitening away for inference."""

import copy

from torch import nn

from ..layers import ChannelDeconv, WhiteningMixin

__all__ = ["fuse"]


def fuse(model: nn.Module) -> nn.Module:
    """A copy of the network, in evaluation mode, whose whitening layers are plain layers that compute the same.

    `Deconv2d` becomes `nn.Conv2d`, `DeconvLinear` `nn.Linear`, `ChannelDeconv` a 1x1 convolution. The model itself is unchanged
    and can go on training.
    """
    plain = copy.deepcopy(model).eval()
    if isinstance(plain, WhiteningMixin | ChannelDeconv):
        return plain.fuse()
    fused: dict[int, nn.Module] = {}
    for parent in list(plain.modules()):
        for key, child in parent._modules.items():
            if isinstance(child, WhiteningMixin | ChannelDeconv):
                parent._modules[key] = fused.setdefault(id(child), child.fuse())
    return plain
