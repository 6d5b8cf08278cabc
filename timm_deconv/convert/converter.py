"""convert_deconv_model: any batch-norm network becomes a deconvolution network, in place."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers.notices import share_notices

from .classifier import ConvertedNetwork, check_pooling, mix_in, new_channel_whitening, whiten_pooling
from .kinds import batch_norms, check_network, is_any_norm
from .plan import Plan, decide, look_at
from .policy import SMALL_BATCH_DEFAULTS, DeconvPolicy, resolve_policy
from .report import ConversionReport, ConvertedLayer
from .self_fusing import own_methods, take_over
from .surgery import remove_norms, replace_module, whitened_form, write_out_of_place
from .trace import Inputs

__all__ = ["carry_out", "check_convertible", "convert_deconv_model"]


def convert_deconv_model(
    model: nn.Module,
    policy: str | Mapping[str, Any] | DeconvPolicy | None = None,
    *,
    family: DeconvPolicy = SMALL_BATCH_DEFAULTS,
    in_place: bool = False,
    example_inputs: Inputs | None = None,
) -> ConversionReport:
    """Replace convolutions and the classifier by whitening layers and take the batch norms out, in place.

    What the policy leaves plain stays as it is, under the preset 'fast' the layers of squeeze-excite modules. A batch
    norm goes where whitening takes its place in what follows: where its output is read by whitened layers, through
    activations, poolings, sums and so on. A norm that a plain layer reads stays, and the report says which and why.

    Weights, hooks and `requires_grad` are kept, missing biases added as zeros, whitening starts at the identity.
    `BatchNorm2d` becomes `Identity`, `BatchNormAct2d` its activation. A timm network is afterwards saved by the name
    `deconv` and loads as such. Methods of its blocks that would fold batch norms (`fuse`, `reparameterize`,
    `switch_to_deploy`) fold whitening instead.

    To see what reads what, the network is run once on an input without data. Of what does not run so, roles are taken
    from shapes alone, norms are judged by the layers beside them, and the report says it.

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
        example_inputs: what the network's forward takes, a tuple of positional or a dictionary of keyword arguments,
            where it is no image of the size that timm's configuration says or of a usual one. It is then run in
            earnest.

    Returns:
        The report, printable as a table.

    Raises:
        InputError: nothing to convert, a pattern that matches no layer, or an option that makes no sense. The model is
            unchanged.
    """
    check_network(model, "convert_deconv_model")
    requested = resolve_policy(policy).updated(family)
    policy = requested.over_published(family)
    check_convertible(model, policy)
    trace, unseen = look_at(model, example_inputs)
    plan = decide(model, requested, policy, trace, batch_norms(model))
    report = carry_out(model, plan, requested, policy, in_place=in_place)
    report.unseen = unseen
    return report


def carry_out(
    model: nn.Module, plan: Plan, requested: DeconvPolicy, policy: DeconvPolicy, *, in_place: bool = False
) -> ConversionReport:
    """Change the network as the plan says, and report."""
    report = ConversionReport(
        parameters_before=_count_parameters(model),
        skipped=plan.skipped,
        norms=plan.removed,
        norms_kept=list(plan.staying.items()),
    )
    layers = {name: (model.get_submodule(name), role, cfg) for name, (role, cfg) in plan.whitened.items()}
    new = {name: whitened_form(layer, cfg) for name, (layer, _, cfg) in layers.items()}
    methods = own_methods(model)
    for name, (layer, role, cfg) in layers.items():
        replace_module(model, layer, new[name])
        part = new[name].partition
        kind = type(new[name]).__name__
        report.converted.append(ConvertedLayer(name, role, kind, part.blocks, part.features, str(cfg)))
    if policy.classifier == "channel":
        whiten_pooling(model, new_channel_whitening(model, policy))
    remove_norms(model, plan.removed)
    report.norms_left = _other_norms(model, plan)
    if not in_place:
        write_out_of_place(model)
    mix_in(model, requested, policy)
    take_over(methods)
    share_notices(model)
    report.parameters_after = _count_parameters(model)
    return report


def check_convertible(model: nn.Module, policy: DeconvPolicy) -> None:
    """Raise InputError for a network that is converted already, is wrapped, or has no pooling where one is needed."""
    kind = type(model).__name__
    if isinstance(model, ConvertedNetwork):
        raise InputError(f"this {kind} is a deconvolution network already: create a new one and convert it")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InputError(f"{kind} wraps the network: convert it before it is wrapped")
    if policy.classifier == "channel":
        check_pooling(model)


def _other_norms(model: nn.Module, plan: Plan) -> list[tuple[str, str]]:
    """(name, class) of the norms that conversion does not take out: of another kind, or that may do more."""
    others = ((name, m) for name, m in model.named_modules() if is_any_norm(m) and name not in plan.staying)
    return [(name, type(module).__name__) for name, module in others]


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
