"""convert_deconv_model: any batch-norm network becomes a deconvolution network, in place."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers import DeconvCfg

from .classifier import ConvertedNetwork, check_pooling, mix_in, new_channel_whitening, whiten_pooling
from .effect import check_effect
from .policy import GUARDED, DeconvPolicy, Role, resolve_policy
from .report import ConversionReport, ConvertedLayer
from .roles import find_roles, linear_layers_as_convs, other_norms, token_linears
from .surgery import (
    remove_norms,
    replace_module,
    take_over_reparameterization,
    whitened_form,
    why_not_whitened,
    write_out_of_place,
)

__all__ = ["convert_deconv_model"]

Plan = dict[str, tuple[Role, DeconvCfg]]


def convert_deconv_model(
    model: nn.Module,
    policy: str | Mapping[str, Any] | DeconvPolicy | None = None,
    *,
    family: DeconvPolicy = GUARDED,
    in_place: bool = False,
) -> ConversionReport:
    """Replace convolutions and the classifier by whitening layers and take the batch norms out, in place.

    What the policy leaves plain stays as it is, under the preset 'fast' the layers of squeeze-excite modules.

    Weights are kept, missing biases added as zeros, whitening starts at the identity. `BatchNorm2d` becomes `Identity`,
    `BatchNormAct2d` its activation. A timm network is afterwards saved by the name `deconv` and loads as such. Methods
    of its blocks that would fold batch norms (`fuse`, `reparameterize`, `switch_to_deploy`) fold whitening instead.

    Args:
        model: a network with `nn.Conv2d` or `nn.Linear` layers, timm's or any other, on any device (meta too). Convert
            it before it is compiled or wrapped for several devices.
        policy: a preset's name, a dictionary of options, or a `DeconvPolicy`; None for the default preset.
        family: what holds under the preset 'paper' where `policy` is silent. By default layers that see fewer rows than
            features are kept in bounds (`min_rows` 1; the published layers have 0), and running values weigh the
            batches so far alike at the start (`start_corrected`).
        in_place: let activations go on writing in place, which saves a pass and a tensor each. Right where every batch
            norm stands directly behind a convolution. Elsewhere what they would overwrite may be read by another
            branch, once the norm before them is gone.

    Returns:
        The report, printable as a table.

    Raises:
        InputError: nothing to convert, a pattern that matches no layer, or an option that makes no sense. The model is
            unchanged.
    """
    requested = resolve_policy(policy).updated(family)
    policy = requested.over_published(family)
    _check_network(model, policy)
    plan, skipped = _plan(model, requested, policy)
    report = ConversionReport(parameters_before=_count_parameters(model), skipped=skipped)
    layers = {name: (model.get_submodule(name), role, cfg) for name, (role, cfg) in plan.items()}
    new = {name: whitened_form(layer, cfg) for name, (layer, _, cfg) in layers.items()}
    for name, (layer, role, cfg) in layers.items():
        replace_module(model, layer, new[name])
        part = new[name].partition
        kind = type(new[name]).__name__
        report.converted.append(ConvertedLayer(name, role, kind, part.blocks, part.features, str(cfg)))
    if policy.classifier == "channel":
        whiten_pooling(model, new_channel_whitening(model, policy))
    report.norms_left = other_norms(model)
    report.norms, unknown = remove_norms(model)
    report.norms_left += unknown
    if not in_place:
        write_out_of_place(model)
    mix_in(model, requested, policy)
    take_over_reparameterization(model)
    report.parameters_after = _count_parameters(model)
    return report


def _check_network(model: nn.Module, policy: DeconvPolicy) -> None:
    kind = type(model).__name__
    if isinstance(model, ConvertedNetwork):
        raise InputError(f"this {kind} is a deconvolution network already: create a new one and convert it")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InputError(f"{kind} wraps the network: convert it before it is wrapped")
    if policy.classifier == "channel":
        check_pooling(model)


def _plan(model: nn.Module, requested: DeconvPolicy, policy: DeconvPolicy) -> tuple[Plan, list[tuple[str, str]]]:
    """What to whiten and what to leave plain, decided before anything is changed."""
    roles = find_roles(model)
    policy.check_patterns(roles)
    convs, tokens = linear_layers_as_convs(model), token_linears(model)
    plan: Plan = {}
    skipped = []
    for name, role in roles.items():
        reason = _reason_to_skip(name, model.get_submodule(name), role, policy, name in tokens)
        cfg = policy.cfg(name, role, linear_as_conv=name in convs)
        if reason is None and cfg is not None:
            plan[name] = (role, cfg)
        else:
            skipped.append((name, reason or "left plain by the policy"))
    if not plan:
        raise InputError(_nothing(model, skipped))
    if "" in plan:
        raise InputError(f"a {type(model).__name__} alone is no network: use Deconv2d or DeconvLinear in its place")
    check_effect(model, requested, roles, plan, convs)
    return plan, skipped


def _nothing(model: nn.Module, skipped: list[tuple[str, str]]) -> str:
    kind = type(model).__name__
    if not skipped:
        return f"nothing to convert in {kind}: it has no convolution or linear layer"
    name, reason = skipped[0]
    return f"nothing to convert in {kind}: {len(skipped)} layers are left plain ({name}: {reason})"


def _reason_to_skip(name: str, layer: nn.Module, role: Role, policy: DeconvPolicy, token_linear: bool) -> str | None:
    if role == "classifier" and policy.classifier != "linear":
        return f"classifier={policy.classifier!r}"
    if token_linear and role == "linear" and not policy.names(name, role):
        return "hidden linear layer without batch norm: name the role 'linear' to whiten it"
    return why_not_whitened(layer)


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
