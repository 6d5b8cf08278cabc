"""update_statistics: running values estimated anew for the weights as they are, as after averaging weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv, WhiteningMixin

from .batches import checked_count, image_batches, images_of

__all__ = ["update_statistics"]

Layer = WhiteningMixin | ChannelDeconv | _BatchNorm


@torch.no_grad()
def update_statistics(model: nn.Module, loader: Iterable[Any], *, batches: int | None = None) -> None:
    """Estimate the running values of whitening layers and batch norms anew, from batches in training mode, weighed
    alike.

    What `torch.optim.swa_utils.update_bn` does for batch norms, which it knows alone. Weights stay as they are, so that
    evaluation changes: `calibrate` keeps it and changes the weights. Layers of frozen statistics, and those that the
    network does not use, keep their values; layers that freeze after some batches go on where they were.

    Args:
        model: a network on any device; it ends in the mode it was in.
        loader: batches as large as in training, of images (N, C, H, W), alone or first of a tuple or list.
        batches: use at most so many.

    Raises:
        InputError: no layer with live statistics, no batches, or a batch that is no such tensor. The statistics are
            as before.
    """
    layers = [module for module in model.modules() if _has_live_statistics(module)]
    if not layers:
        raise InputError(f"no live statistics in {type(model).__name__}: there is no such layer, or all are frozen")
    like, seen = next(layers[0].buffers()), 0
    with _gathering(model, layers):
        for batch in islice(image_batches(loader), checked_count(batches)):
            model(images_of(batch, like))
            seen += 1
        if not seen:
            raise InputError("no batches to estimate from: the loader is empty, or its iterator was used up before")


def _has_live_statistics(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.track_running_stats and module.running_mean is not None
    return isinstance(module, WhiteningMixin | ChannelDeconv) and not module.statistics_frozen


@contextmanager
def _gathering(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    """The network in training mode, its statistics averaging all batches alike; as before where nothing was seen."""
    modes = [(module, module.training) for module in model.modules()]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    momenta = [getattr(layer, "momentum", None) for layer in layers]
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            _average_alike(layer, True, None)
        yield
    except BaseException:
        for layer, values in zip(layers, before, strict=True):
            _restore(layer, values)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            _average_alike(layer, False, momentum)
        for module, mode in modes:
            module.train(mode) if module in layers else setattr(module, "training", mode)
    for layer, values in zip(layers, before, strict=True):
        if not layer.num_batches_tracked:
            _restore(layer, values)
        elif isinstance(layer, WhiteningMixin) and layer.cfg.freeze:
            layer.num_batches_tracked.copy_(values["num_batches_tracked"])


def _average_alike(layer: Layer, alike: bool, momentum: float | None) -> None:
    if isinstance(layer, _BatchNorm):
        layer.momentum = momentum
    else:
        layer.cumulative = alike


def _restore(layer: Layer, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        layer.get_buffer(name).copy_(value)
