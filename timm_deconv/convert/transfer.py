"""transfer: a batch-norm network becomes a deconvolution network of the same function, its weights carried over.

In evaluation batch norm is a fixed scale and shift a channel. Folded into the weight and bias of the convolution before
it, it is gone, and a whitening layer that starts at the identity is that convolution.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.layers import ChannelDeconv
from timm_deconv.layers.notices import share_notices
from timm_deconv.linalg import to_double

from .affine import ChannelAffine
from .converter import carry_out, check_convertible
from .kinds import BatchNorm, batch_norms, check_network, frozen_norms
from .pairing import Pairing, pair_norms
from .plan import decide
from .policy import SMALL_BATCH_DEFAULTS, DeconvPolicy, resolve_policy
from .report import ConversionReport
from .surgery import keep_hooks
from .trace import Inputs, trace_network

__all__ = ["transfer"]

ScaleShift = tuple[Tensor, Tensor]


@torch.no_grad()
def transfer(
    model: nn.Module,
    policy: str | Mapping[str, Any] | DeconvPolicy | None = None,
    *,
    keep_affine: bool = False,
    input_size: tuple[int, ...] | None = None,
    example_inputs: Inputs | None = None,
    family: DeconvPolicy = SMALL_BATCH_DEFAULTS,
) -> ConversionReport:
    """Convert a batch-norm network as `convert_deconv_model` does, in place, so that it evaluates as before.

    Every batch norm that goes is folded into the convolution or linear layer before it (or into those whose
    concatenated outputs it normalises); whitening starts at the identity. `calibrate` then makes training start
    whitened too. Norms that plain layers read stay as they are, as in `convert_deconv_model`.

    Args:
        model: a network with trained batch norms. Frozen ones, torchvision's `FrozenBatchNorm2d` and what timm's
            `freeze` makes, are folded as the others are.
        policy: which layer is whitened how; None for the default preset.
        keep_affine: let norms that follow no convolution, as in pre-norm networks (DenseNet, PreAct and V2 ResNets,
            DPN), stay as a scale and shift of each channel (`ChannelAffine`), instead of refusing.
        input_size: (C, H, W) that the network takes, where timm's configuration does not say it. The network is run
            once, on a tensor without data, to see what each norm follows.
        example_inputs: what the network's forward takes, where it is no image: a tuple of positional or a dictionary of
            keyword arguments, such as `([image, image],)` of a detector. It is then run in earnest.
        family: what holds under the preset 'paper' where `policy` is silent, as in `convert_deconv_model`.

    Returns:
        The report; its `affine` names the norms that stayed as scale and shift.

    Raises:
        InputError: no batch norm, one that cannot be folded (unless `keep_affine`) or has no running statistics, a
            network that does not run, or what `convert_deconv_model` refuses. The model is unchanged.
    """
    check_network(model, "transfer")
    norms: dict[str, BatchNorm] = {**batch_norms(model), **frozen_norms(model)}
    if not norms:
        raise InputError(f"no batch norm in {type(model).__name__}: there is nothing to fold; use convert_deconv_model")
    requested = resolve_policy(policy).updated(family)
    policy = requested.over_published(family)
    check_convertible(model, policy)
    trace = trace_network(model, input_size=input_size, example_inputs=example_inputs)
    plan = decide(model, requested, policy, trace, norms)
    pairing = pair_norms(model, trace, {name: norms[name] for name in plan.removed})
    _check(model, norms, pairing, keep_affine)
    folded = _folded(model, norms, pairing)
    kept = {name: _scale_and_shift(norms[name]) for name in pairing.refused}
    places = {name: [n for n, m in model.named_modules(remove_duplicate=False) if m is norms[name]] for name in kept}
    report = carry_out(model, plan, requested, policy)
    for name, (weight, bias) in folded.items():
        _set_parameters(model.get_submodule(name), weight, bias)
    for name, values in kept.items():
        parameter: Tensor | None = getattr(norms[name], "weight", None)
        trained = parameter is None or parameter.requires_grad
        _put_affine(model, places[name], values, trained)
    for module in model.modules():
        if isinstance(module, ChannelDeconv):  # the identity for its remaining channels too
            module.running_var.fill_(1 - module.eps)
    share_notices(model).uncalibrated = True
    report.affine = list(kept)
    report.parameters_after = sum(parameter.numel() for parameter in model.parameters())
    return report


def _check(model: nn.Module, norms: dict[str, BatchNorm], pairing: Pairing, keep_affine: bool) -> None:
    kind = type(model).__name__
    for name in pairing.refused:
        if norms[name].running_var is None:
            raise InputError(f"batch norm {name} of {kind} keeps no running statistics: it is no fixed map")
    if pairing.refused and not keep_affine:
        name, reason = next(iter(pairing.refused.items()))
        raise InputError(
            f"{len(pairing.refused)} of {len(norms)} batch norms of {kind} cannot be folded into a convolution before"
            f" them ({name} {reason}), as in pre-norm networks; transfer(model, keep_affine=True) keeps their scale and"
            " shift as a layer, or train from the beginning with convert_deconv_model"
        )


def _scale_and_shift(norm: BatchNorm) -> ScaleShift:
    """What the norm does to a channel in evaluation, in float64."""
    mean, var, weight, bias = (getattr(norm, key) for key in ("running_mean", "running_var", "weight", "bias"))
    scale: Tensor = (to_double(var) + norm.eps).rsqrt()
    if weight is not None:
        scale = scale * to_double(weight)
    shift = -to_double(mean) * scale
    return scale, shift if bias is None else shift + to_double(bias)


def _folded(model: nn.Module, norms: dict[str, BatchNorm], pairing: Pairing) -> dict[str, ScaleShift]:
    """Weight and bias, in float64, of every layer that takes a norm in."""
    folded = {}
    for norm, layers in pairing.folds.items():
        scale, shift = _scale_and_shift(norms[norm])
        for name, channels in layers:
            layer = model.get_submodule(name)
            assert isinstance(layer.weight, Tensor)
            weight = to_double(layer.weight) * scale[channels].reshape(-1, *[1] * (layer.weight.ndim - 1))
            bias = shift[channels]
            folded[name] = weight, bias if layer.bias is None else bias + to_double(layer.bias) * scale[channels]  # type: ignore[arg-type]
    return folded


def _set_parameters(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    assert isinstance(layer.weight, Tensor)
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)  # type: ignore[operator]


def _put_affine(model: nn.Module, places: list[str], values: ScaleShift, trained: bool) -> None:
    """Where a norm stood: its scale and shift, then what conversion left there, which may be its activation."""
    like = next(model.parameters())
    affine = ChannelAffine(*(value.to(like) for value in values)).requires_grad_(trained)
    left = model.get_submodule(places[0])
    if isinstance(left, nn.Identity):
        keep_hooks(left, affine)
    new = affine if isinstance(left, nn.Identity) else nn.Sequential(OrderedDict(affine=affine, act=left))
    for place in places:
        model.set_submodule(place, new)
