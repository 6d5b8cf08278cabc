"""A picture as a whitening convolution sees it: its windows before and after, and how their values correlate."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_deconv.layers import Deconv2d

__all__ = ["Windows", "correlations", "has_statistics", "middles", "whiten_windows"]

EVERY_WINDOW = {"sampling_stride": 1, "max_rows": 0}


class Windows(NamedTuple):
    """The windows around every pixel of an image of C channels.

    Attributes:
        plain: (F, H, W), F = C * kernel height * kernel width values a window, zeros outside the image.
        whitened: (F, H, W).
    """

    plain: Tensor
    whitened: Tensor


@torch.no_grad()
def whiten_windows(image: Tensor, layer: Deconv2d) -> Windows:
    """Whiten the windows of an image as a layer does: by its running statistics or, where it has none, the image's own.

    Args:
        image: (C, H, W).
        layer: of one group; its weight, stride and padding do not matter.
    """
    values = layer.weight[0].numel()
    cfg = layer.cfg.override(EVERY_WINDOW)
    identity = Deconv2d(layer.in_channels, values, layer.kernel_size, padding="same", dilation=layer.dilation, cfg=cfg)
    identity.weight.copy_(torch.eye(values).reshape(identity.weight.shape))
    identity.bias.zero_()
    plain = F.conv2d(image[None], identity.weight, padding="same", dilation=layer.dilation)[0]
    if has_statistics(layer):
        identity.running_mean.copy_(layer.running_mean)
        identity.running_deconv.copy_(layer.running_deconv)
        identity.eval()
    return Windows(plain, identity(image[None])[0])


def has_statistics(layer: Deconv2d) -> bool:
    """Tell whether a layer's running whitener is one: of new, transferred and folded layers it is the identity."""
    eye = torch.eye(layer.blocks.features, dtype=layer.running_deconv.dtype)
    return not torch.equal(layer.running_deconv, eye.expand_as(layer.running_deconv))


def middles(windows: Tensor, layer: Deconv2d) -> Tensor:
    """Return the middle pixels (C, H, W) of windows (F, H, W)."""
    height, width = layer.kernel_size
    return windows[height // 2 * width + width // 2 :: height * width]


def correlations(windows: Tensor) -> Tensor:
    """Compute the correlations (F, F) of the values of windows (F, H, W); zero for those that do not vary."""
    return torch.corrcoef(windows.flatten(1).double()).nan_to_num(0)  # in double what is constant has no variance
