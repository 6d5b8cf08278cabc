"""The rows that a layer samples of its input, gathered plainly."""

from torch import Tensor

from timm_deconv.kernels.blocks import split_rows
from timm_deconv.kernels.windows import gather
from timm_deconv.layers import Deconv2d, DeconvLinear

__all__ = ["sampled_rows"]


def sampled_rows(layer: Deconv2d | DeconvLinear, input: Tensor) -> Tensor:
    """Return rows (S, R, F) of a convolution's or a linear layer's input."""
    if isinstance(layer, DeconvLinear):
        return split_rows(input, layer.blocks)
    x = layer._padded_batch(input)
    return split_rows(gather(x, layer._geometry(x).sampling), layer.blocks)
