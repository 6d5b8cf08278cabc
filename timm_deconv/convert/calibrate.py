"""calibrate: the whitening of a trained network's layers without a change of what it computes.

After `transfer` every whitener is the identity, and the first training step would put a whitened input under weights
that were learned on a plain one. Here the whitener becomes D, the inverse root of the average covariance over many
images, and the weight takes its inverse in: (w D^-1) D = w. The function stays, and training starts whitened.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.layers import WhiteningMixin
from timm_deconv.layers.functional import Moments, estimate, fold, root_of
from timm_deconv.layers.notices import share_notices
from timm_deconv.linalg import to_double

from .statistics import images_of

__all__ = ["calibrate"]

Values = tuple[Tensor, Tensor, Tensor, Tensor]
"""New weight, bias, running mean and whitener of a layer, of its shapes and dtypes."""


@torch.no_grad()
def calibrate(model: nn.Module, loader: Iterable[Any], *, batches: int | None = None) -> dict[str, int]:
    """Estimate every layer's mean and whitener from images, in one pass, and absorb their inverse into its parameters.

    The layers' samples of their inputs are gathered in evaluation mode and count alike. The whitener is the layer's own
    inverse root of their covariance. In evaluation the network is the same function as before, to rounding.

    A calibrated layer counts the batches of the pass as seen; with `cfg.freeze` it counts its live forwards as done, so
    that it starts frozen at the calibrated values. Layers that the evaluating
    network does not use (an auxiliary head) stay as they are, and so does `ChannelDeconv`: it has no weight that could
    absorb anything, and in training it whitens its input, which evaluation passed unchanged.

    Args:
        model: a network with whitening layers, on any device; it ends in the mode it was in.
        loader: batches of images (N, C, H, W) normalised as in training, alone or first of a tuple or list; a tensor is
            one batch.
        batches: use at most so many.

    Returns:
        Number of samples by name of the layer.

    Raises:
        InputError: no whitening layer (a fused network has none), no batches, a batch that is no such tensor, a layer
            without a bias, with parameters that it shares or computes, or with fewer samples than features, or
            activations that are not finite. The network is unchanged.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WhiteningMixin)}
    _check_layers(model, layers)
    moments: dict[str, Moments] = {}
    seen = image_count = 0
    with _evaluating(model, layers, moments):
        for images in images_of(loader, batches, next(iter(layers.values())).weight):
            model(images)
            seen += 1
            image_count += len(images)
    if not seen:
        raise InputError("no batches to calibrate on: the loader is empty, or its iterator was used up before")
    _check_samples(layers, moments, image_count)
    values = {name: _values(name, layers[name], moments[name]) for name in layers if name in moments}
    for name, new in values.items():
        _write(layers[name], new, seen)
    share_notices(model).uncalibrated = False
    return {name: moments[name].row_count for name in values}


def _write(layer: WhiteningMixin, values: Values, batches: int) -> None:
    for tensor, value in zip(_targets(layer), values, strict=True):
        tensor.copy_(value)
    layer.num_batches_tracked.fill_(layer.cfg.freeze_iter + 1 if layer.cfg.freeze else batches)
    layer.forget_power()


def _targets(layer: WhiteningMixin) -> tuple[Tensor, ...]:
    """Return weight, bias, running mean and whitener of a layer that has them all."""
    assert layer.bias is not None
    return layer.weight, layer.bias, layer.running_mean, layer.running_deconv


def _combined(before: Moments | None, latest: Moments) -> Moments:
    """Combine the moments of all batches so far with those of one more, in float64 (Chan, Golub and LeVeque, 1979)."""
    latest = latest._replace(mean=to_double(latest.mean), cov=to_double(latest.cov))
    if before is None:
        return latest
    rows = before.row_count + latest.row_count
    share = latest.row_count / rows
    step = latest.mean - before.mean
    cov = torch.lerp(before.cov, latest.cov, share)
    cov += share * (1 - share) * step.unsqueeze(-1) * step.unsqueeze(-2)
    padding = before.padding + share * (latest.padding - before.padding)
    return Moments(before.mean + share * step, cov, rows, padding)


def _check_layers(model: nn.Module, layers: dict[str, WhiteningMixin]) -> None:
    if not layers:
        raise InputError(
            f"no whitening layer in {type(model).__name__}: a fused network has none; calibrate before fusing, or"
            " convert the network first"
        )
    for name, layer in layers.items():
        _check_parameters(name, layer)
    users: dict[int, str] = {}
    for name, module in model.named_modules():
        for kind, parameter in module._parameters.items():
            other = name if parameter is None else users.setdefault(parameter.data_ptr() or id(parameter), name)
            if other != name and not layers.keys().isdisjoint((name, other)):
                raise InputError(f"{name} shares its {kind} with {other}, which cannot fit both whiteners; untie them")


def _check_parameters(name: str, layer: WhiteningMixin) -> None:
    for kind in ("weight", "bias"):
        if layer._parameters.get(kind) is None and getattr(layer, kind, None) is not None:
            raise InputError(
                f"the {kind} of {name} is computed, by parametrisation or pruning: make it permanent first"
            )
    if layer.bias is None:
        raise InputError(
            f"{name} has no bias, which would take in the mean of its input: give it one of zeros,"
            f" layer.bias = nn.Parameter(torch.zeros({layer.weight.shape[0]}))"
        )
    if any(tensor.is_inference() for tensor in _targets(layer)) and not torch.is_inference_mode_enabled():
        raise InputError(f"{name} was made in inference mode: calibrate there too, or copy the network outside")


@contextmanager
def _evaluating(model: nn.Module, layers: dict[str, WhiteningMixin], moments: dict[str, Moments]) -> Iterator[None]:
    """Evaluate the network and watch its layers' inputs; afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    watches = [
        layer.register_forward_pre_hook(_watch(name, layer, moments), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        yield
    finally:
        for watch in watches:
            watch.remove()
        for module, mode in modes:
            module.training = mode


def _watch(name: str, layer: WhiteningMixin, moments: dict[str, Moments]) -> Any:
    def watch(_layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        input = args[0] if args else kwargs["input"]
        if isinstance(layer, nn.Conv2d) and input.ndim != 4:
            raise InputError(f"{name} was given one image, {tuple(input.shape)}: calibrate takes batches of images")
        latest = layer.moments(input) if input.numel() else None
        if latest is not None and latest.row_count:
            moments[name] = _combined(moments.get(name), latest)

    return watch


def _check_samples(layers: dict[str, WhiteningMixin], moments: dict[str, Moments], images: int) -> None:
    """Check that the layer that lacks most has a row a feature; say how many images bring them."""
    samples = [(layers[name].blocks.features, found.row_count, name) for name, found in moments.items()]
    features, rows, name = max(samples, key=lambda sample: sample[0] / sample[1], default=(0, 0, ""))
    if rows < features:
        raise InputError(
            f"too few samples to calibrate {name}: it saw {rows} rows and needs at least {features}, one a feature;"
            f" give {-(-features * images // rows)} images, not {images}"
        )


def _values(name: str, layer: WhiteningMixin, moments: Moments) -> Values:
    """Compute, in float64, what leaves a layer's function as it is and whitens its input."""
    if not (moments.mean.isfinite().all() and moments.cov.isfinite().all()):
        raise InputError(f"the input of {name} is not finite: look for NaN or infinity in the images and the weights")
    weight, bias = (to_double(value) for value in layer.folded())
    statistics = estimate(moments, root_of(layer.cfg, zeroes_constant=False))
    mean, matrix = statistics.mean, statistics.whitener
    # Folding with D^-1 and -D mu undoes folding with D and mu.
    shift = -(matrix @ mean.unsqueeze(-1)).squeeze(-1)
    inverse, singular = torch.linalg.inv_ex(matrix)
    absorbed = fold(weight, bias, shift, inverse, layer.blocks)
    pairs = zip((*absorbed, mean, matrix), _targets(layer), strict=True)
    new = [value.reshape(like.shape).to(like.dtype) for value, like in pairs]
    if singular.any() or not all(value.isfinite().all() for value in new):
        raise InputError(
            f"the weight of {name} cannot absorb the inverse of its whitener in {layer.weight.dtype}: look for weights"
            " or inputs that are not finite or very large, or use float32"
        )
    return new[0], new[1], new[2], new[3]
