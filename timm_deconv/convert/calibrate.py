"""calibrate: whiten the layers of a trained network without changing what it computes.

After `transfer` every whitener is the identity, and the first training step would put a whitened input under weights
that were learned on a plain one. Here the whitener becomes D, the inverse root of the average covariance over many
images, and the weight takes its inverse in: (w D^-1) D = w. The function stays, and training starts whitened.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.layers import WhiteningMixin
from timm_deconv.layers.whitening import count_padding, fold, whitener
from timm_deconv.linalg import covariance, full_precision

__all__ = ["calibrate"]


@torch.no_grad()
def calibrate(model: nn.Module, loader: Iterable[Any], *, batches: int | None = None) -> dict[str, int]:
    """Estimate every layer's mean and whitener from images, in one pass, and absorb their inverse into its parameters.

    The layers' samples of their inputs are gathered in evaluation mode and count alike. The whitener is the layer's own
    inverse root of their covariance. In evaluation the network is the same function as before, to rounding.

    What the counter of a calibrated layer says: that it has seen the batches of the pass; or, with `cfg.freeze`, that
    its live forwards are behind it, so that it starts frozen at the calibrated values. Layers that the evaluating
    network does not use (an auxiliary head) stay as they are, and so does `ChannelDeconv`: it has no weight that could
    absorb anything, and in training it whitens what it let pass before.

    Args:
        model: a network with whitening layers, on any device; it ends in the mode it was in.
        loader: batches of images (N, C, H, W) normalised as in training, alone or first of a tuple or list.
        batches: use at most so many.

    Returns:
        Number of samples by name of the layer.

    Raises:
        InputError: no whitening layer (a fused network has none), no batches, a batch that is no such tensor, weights
            shared between layers, a layer with fewer samples than features, or activations that are not finite. The
            network is unchanged.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WhiteningMixin)}
    _check_layers(model, layers)
    moments = {name: _Moments() for name in layers}
    seen = 0
    with _evaluating(model, layers, moments):
        for batch in islice(loader, batches):
            model(_images(batch, next(iter(layers.values())).weight))
            seen += 1
    if not seen:
        raise InputError("no batches to calibrate on: the loader is empty, or its iterator was used up before")
    reached = {name: moments[name] for name in layers if moments[name].rows}
    values = {name: _values(name, layers[name], moments) for name, moments in reached.items()}
    for name, (weight, bias, mean, matrix) in values.items():
        layer = layers[name]
        assert layer.bias is not None
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        layer.running_mean.copy_(mean.reshape(layer.running_mean.shape))
        layer.running_deconv.copy_(matrix.reshape(layer.running_deconv.shape))
        layer.num_batches_tracked.fill_(layer.cfg.freeze_iter + 1 if layer.cfg.freeze else seen)
    return {name: moments.rows for name, moments in reached.items()}


class _Moments:
    """Mean and covariance of all rows so far, combined in float64 (Chan, Golub and LeVeque, 1979), and the weight of
    padding, which is not among them."""

    def __init__(self) -> None:
        self.rows = 0
        self.padding = 0.0
        self.mean = self.cov = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor, padding: float) -> None:
        """Take in rows (S, R, F) and the weight of padding in their batch."""
        count = rows.shape[-2]
        if not count:
            return
        mean, cov = (moment.double() for moment in covariance(rows))
        if not self.rows:
            self.mean, self.cov, self.padding = mean, cov, padding
        else:
            share = count / (self.rows + count)
            self.padding += share * (padding - self.padding)
            step = mean - self.mean
            self.mean = self.mean + share * step
            self.cov = torch.lerp(self.cov, cov, share) + share * (1 - share) * step.unsqueeze(-1) * step.unsqueeze(-2)
        self.rows += count


def _check_layers(model: nn.Module, layers: dict[str, WhiteningMixin]) -> None:
    if not layers:
        raise InputError(
            f"no whitening layer in {type(model).__name__}: a fused network has none; calibrate before fusing, or"
            " convert the network first"
        )
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(id(layer.weight), name)
        if other != name:
            raise InputError(f"{name} shares its weight with {other}: it cannot absorb two whiteners; untie them first")


@contextmanager
def _evaluating(model: nn.Module, layers: dict[str, WhiteningMixin], moments: dict[str, _Moments]) -> Iterator[None]:
    """The network in evaluation mode, its layers' inputs being watched; afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    watches = [layer.register_forward_pre_hook(_watch(layer, moments[name])) for name, layer in layers.items()]
    try:
        model.eval()
        yield
    finally:
        for watch in watches:
            watch.remove()
        for module, mode in modes:
            module.training = mode


def _watch(layer: WhiteningMixin, moments: _Moments) -> Any:
    def watch(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with full_precision(inputs[0]):
            moments.add(layer.rows(inputs[0]), layer.padding_share(inputs[0]))

    return watch


def _images(batch: Any, like: Tensor) -> Tensor:
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"a batch of {kind}: calibrate takes normalised floating-point images, or (images, targets)")
    return images.to(like.device, like.dtype)


def _values(name: str, layer: WhiteningMixin, moments: _Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New weight, bias, running mean and whitener of a layer, in float64, that leave its function as it is."""
    features = layer.partition.features
    if moments.rows < features:
        raise InputError(
            f"too few samples to calibrate {name}: it saw {moments.rows} rows and needs at least {features}, one a"
            " feature; give more images"
        )
    if not (moments.mean.isfinite().all() and moments.cov.isfinite().all()):
        raise InputError(f"the input of {name} is not finite: look for NaN or infinity in the images and the weights")
    weight, bias = layer.folded()
    mean, cov = count_padding(moments.mean, moments.cov, moments.padding)
    matrix = whitener(cov, moments.rows, layer.cfg)
    # Folding with D^-1 and -D mu undoes folding with D and mu.
    shift = -(matrix @ mean.unsqueeze(-1)).squeeze(-1)
    absorbed = fold(weight.double(), bias.double(), shift, torch.linalg.inv(matrix), layer.partition)
    return *absorbed, mean, matrix
