"""Running statistics of whitening layers and batch norms alike: frozen, let live, estimated anew."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import timm.utils
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.layers import WhiteningMixin

from .module_types import WHITENING_TYPES

__all__ = ["freeze", "freeze_statistics", "images_of", "kept_buffers", "unfreeze", "update_statistics"]


def freeze(root_module: nn.Module, submodules: str | Iterable[str] = (), include_bn_running_stats: bool = True) -> None:
    """Freeze parameters and statistics as `timm.utils.freeze` does, of whitening layers as well as of batch norms.

    A frozen whitening layer uses its running values in training too and leaves them as they are.

    Args:
        root_module: a network, changed in place.
        submodules: names of the modules to freeze; the whole network if there are none.
        include_bn_running_stats: freeze the statistics too, not only the parameters.

    Raises:
        InputError: a name that the network does not have, with the nearest ones. Nothing is changed.
    """
    names = _checked(root_module, submodules)
    timm.utils.freeze(root_module, names, include_bn_running_stats)
    if include_bn_running_stats:
        freeze_statistics(root_module, names)


def unfreeze(
    root_module: nn.Module, submodules: str | Iterable[str] = (), include_bn_running_stats: bool = True
) -> None:
    """Undo `freeze`; arguments and errors as there."""
    names = _checked(root_module, submodules)
    timm.utils.unfreeze(root_module, names, include_bn_running_stats)
    if include_bn_running_stats:
        freeze_statistics(root_module, names, frozen=False)


def freeze_statistics(root_module: nn.Module, submodules: Iterable[str] = (), *, frozen: bool = True) -> None:
    """Freeze only the statistics of whitening layers, or let them live again, in `submodules` or, if none, in all."""
    for name in list(submodules) or [""]:
        for module in root_module.get_submodule(name).modules():
            if isinstance(module, WHITENING_TYPES):
                module.statistics_frozen = frozen


def _checked(root_module: nn.Module, submodules: str | Iterable[str]) -> list[str]:
    names = [submodules] if isinstance(submodules, str) else list(submodules or ())
    known = {name for name, _ in root_module.named_modules(remove_duplicate=False)}
    for name in names:
        if name not in known:
            raise unknown_name("module", str(name), known - {""})
    return names


@torch.no_grad()
def update_statistics(model: nn.Module, loader: Iterable[Any], *, batches: int | None = None) -> None:
    """Estimate the running values of whitening layers and batch norms anew, from batches in training mode that count
    alike.

    It is `torch.optim.swa_utils.update_bn` for whitening layers too. Weights stay as they are, so that
    evaluation changes: `calibrate` keeps it and changes the weights. Layers of frozen statistics, and those that the
    network does not use, keep their values; layers that freeze after some batches go on where they were.

    Args:
        model: a network on any device; it ends in the mode it was in.
        loader: batches as large as in training, of images (N, C, H, W), by themselves or first of a tuple or list.
        batches: use at most so many.

    Raises:
        InputError: no layer with live statistics, no batches, or a batch that is no such tensor. The statistics are
            as before.
    """
    layers = [module for module in model.modules() if _has_live_statistics(module)]
    if not layers:
        raise InputError(f"no live statistics in {type(model).__name__}: there is no such layer, or all are frozen")
    like, seen = next(layers[0].buffers()), 0
    with _averaging_anew(model, layers):
        for images in images_of(loader, batches, like):
            model(images)
            seen += 1
        if not seen:
            raise InputError("no batches to estimate from: the loader is empty, or its iterator was used up before")


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the buffers of a network back, in place, when the context is left: what is trained within does not count.

    A CUDA graph of a training step is captured after a few steps that warm up, on a batch that is trained on again.
    Weights move only by an optimiser, but running statistics would.

    Args:
        model: a network on any device.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def images_of(loader: Iterable[Any], batches: int | None, like: Tensor) -> Iterator[Tensor]:
    """Yield the images (N, C, H, W) of a loader's batches, on the device and in the dtype of `like`.

    Args:
        loader: batches of images, by themselves or first of a tuple or list; a tensor is one batch.
        batches: take at most so many; None for all.
        like: a tensor of the network.

    Raises:
        InputError: `batches` is less than one, or a batch holds no floating-point images.
    """
    if batches is not None and batches < 1:
        raise InputError(f"batches={batches}: at least one is needed; None takes all")
    if isinstance(loader, Tensor):
        if loader.ndim != 4:
            raise InputError(f"a tensor of shape {tuple(loader.shape)}: give batches of images (N, C, H, W)")
        loader = [loader]
    for batch in islice(loader, batches):
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"a batch of {kind}: give normalised floating-point images, or (images, targets)")
        yield images.to(like.device, like.dtype)


def _has_live_statistics(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.track_running_stats and module.running_mean is not None
    return isinstance(module, WHITENING_TYPES) and not module.statistics_frozen


@contextmanager
def _averaging_anew(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    """Put the network in training mode with statistics that average all batches alike; undo it where none were seen."""
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


def _average_alike(layer: Any, alike: bool, momentum: float | None) -> None:
    if isinstance(layer, _BatchNorm):
        layer.momentum = momentum
    else:
        layer.cumulative = alike


def _restore(layer: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        layer.get_buffer(name).copy_(value)
