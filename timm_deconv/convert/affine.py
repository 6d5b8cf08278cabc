"""ChannelAffine: what evaluation leaves of a batch norm that cannot be folded."""

from torch import Tensor, nn

__all__ = ["ChannelAffine"]


class ChannelAffine(nn.Module):
    """A learned scale and shift of each channel: (N, C, ...) -> the same, weight[c] * x + bias[c].

    Args:
        weight, bias: (C,), where the two start.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        shape = [1, -1] + [1] * (x.ndim - 2)
        return x * self.weight.reshape(shape) + self.bias.reshape(shape)

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"{self.weight.shape[0]}"
