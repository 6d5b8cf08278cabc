"""Memory formats of images and of weights (N, C, H, W), contiguous or in channels_last, and where they lie."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["in_format", "is_channels_last", "memory_format", "on_cpu", "overlaps"]


def is_channels_last(values: Tensor) -> bool:
    """Tell whether values are in channels_last alone: those of one pixel or one channel are contiguous too."""
    return values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous()


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return channels_last or the contiguous format."""
    return torch.channels_last if channels_last else torch.contiguous_format


def in_format(values: Tensor, channels_last: bool) -> Tensor:
    """Return values in channels_last, or contiguous, and copy them if need be."""
    if channels_last:
        return values.contiguous(memory_format=torch.channels_last)
    return values.reshape(-1).view(values.shape)  # contiguous() leaves 1x1 kernels in what looks like channels_last


def overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether elements of a tensor may share memory: whether any step is within the reach of the smaller ones."""
    reach = 0
    for step, extent in sorted(zip(strides, shape, strict=True)):
        if extent > 1:
            if step <= reach:
                return True
            reach += (extent - 1) * step
    return False


def on_cpu(values: Tensor) -> bool:
    """Tell whether values are on a CPU, where arithmetic costs more than what it takes to begin it."""
    return values.device.type == "cpu"
