"""transfer: weights trained with batch norm go into a deconvolution network of the same function."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.layers.notices import share_notices

from .bn_folding import ChannelAffine, Folding, find_folding, fold_norms, scale_and_shift, set_parameters
from .converter import ConversionReport, apply_plan, check_convertible
from .flow import observe
from .module_replace import keep_hooks, replace_modules
from .module_types import BatchNorm, batch_norms, check_network, frozen_norms
from .plan import make_plan
from .policy import SMALL_BATCH_DEFAULTS, DeconvPolicy, resolve_policy
from .trace import Inputs

__all__ = ["transfer"]


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
    check_convertible(model)
    flows = observe(model, input_size=input_size, example_inputs=example_inputs)
    plan = make_plan(model, requested, requested.over_published(family), flows, norms)
    folding = find_folding(model, flows, {name: norms[name] for name in plan.removed})
    _check_folding(model, norms, folding, keep_affine)
    folded = fold_norms(model, norms, folding)
    report = apply_plan(model, plan)
    for name, parameters in folded.items():
        set_parameters(model.get_submodule(name), *parameters)
    for name in folding.refused:
        _put_affine(model, name, norms[name])
    share_notices(model).uncalibrated = True
    report.affine = list(folding.refused)
    report.parameters_after = sum(parameter.numel() for parameter in model.parameters())
    return report


def _check_folding(model: nn.Module, norms: dict[str, BatchNorm], folding: Folding, keep_affine: bool) -> None:
    kind = type(model).__name__
    for name in folding.refused:
        if norms[name].running_var is None:
            raise InputError(f"batch norm {name} of {kind} keeps no running statistics: it is no fixed map")
    if folding.refused and not keep_affine:
        name, reason = next(iter(folding.refused.items()))
        raise InputError(
            f"{len(folding.refused)} of {len(norms)} batch norms of {kind} cannot be folded into a convolution before"
            f" them ({name} {reason}), as in pre-norm networks; transfer(model, keep_affine=True) keeps their scale and"
            " shift as a layer, or train from the beginning with convert_deconv_model"
        )


def _put_affine(model: nn.Module, name: str, norm: BatchNorm) -> None:
    """Put a norm's scale and shift where it stood, before what conversion left there, which may be its activation."""
    like = next(model.parameters())
    weight: Tensor | None = getattr(norm, "weight", None)
    affine = ChannelAffine(*(value.to(like) for value in scale_and_shift(norm)))
    affine.requires_grad_(weight is None or weight.requires_grad)
    left = model.get_submodule(name)
    if isinstance(left, nn.Identity):
        keep_hooks(left, affine)
        replace_modules(model, {left: affine})
    else:
        replace_modules(model, {left: nn.Sequential(OrderedDict(affine=affine, act=left))})
