"""Small pairs of networks with random weights, served in a thread of the test."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch

import timm_deconv  # noqa: F401 registers the models
from timm_deconv.demo import DemoServer, Pair

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def small_pair(channels: int = 3) -> Pair:
    """Make a pair for CIFAR-10, also in grey, whose first layer has whitened a few batches."""
    torch.manual_seed(0)
    deconv, twin = (timm.create_model(f"resnet18_025_cifar{form}", in_chans=channels) for form in ("_deconv", ""))
    for model in (deconv, twin):
        mean, std = ((value,) * channels for value in (0.5, 0.25))
        model.pretrained_cfg |= {"input_size": (channels, 32, 32), "mean": mean, "std": std, "label_names": CLASSES}
    deconv.train()
    for _ in range(3):
        deconv(torch.randn(8, channels, 32, 32))
    return Pair(deconv, twin)


@contextmanager
def served(pair: Pair) -> Iterator[DemoServer]:
    """Serve a pair's page on any free port."""
    with DemoServer() as server:
        server.pair = pair
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
