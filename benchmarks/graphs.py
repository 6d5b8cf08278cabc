"""A training step as one CUDA graph, captured as the documentation shows it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from timm_deconv import kept_buffers

__all__ = ["WARMUP", "captured"]

WARMUP = 3
"""Steps before a capture. DistributedDataParallel wants 11."""


def captured(step: Callable[[], Tensor], model: nn.Module, warmup: int = WARMUP) -> Callable[[], Tensor]:
    """Capture what a step launches, and return a function that launches it again.

    Args:
        step: makes gradients and returns the loss, from tensors that stay where they are; it zeroes gradients in place
            or leaves them alone. It does not wait for the device.
        model: what it trains, on a GPU. The buffers stay as they were.
        warmup: steps that are taken before.

    Returns:
        a function that returns the loss, the same tensor each time.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), kept_buffers(model):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may load images, or watch NCCL
        loss = step()

    def replay(reads: object = step) -> Tensor:  # what the graph reads must stay where it is
        graph.replay()
        return loss

    return replay
