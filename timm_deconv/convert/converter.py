"""convert_deconv_model: any batch-norm network becomes a deconvolution network, in place."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers.notices import share_notices

from .flow import observe_what_runs
from .fuse import folding_methods, override_folding
from .head import ConvertedNetwork, extend_network
from .module_replace import remove_norms, replace_modules, whitened_form, write_out_of_place
from .module_types import batch_norms, check_network, is_any_norm
from .plan import Plan, make_plan
from .policy import SMALL_BATCH_DEFAULTS, DeconvPolicy, resolve_policy
from .trace import Inputs

__all__ = ["ConversionReport", "ConvertedLayer", "apply_plan", "check_convertible", "convert_deconv_model"]


def convert_deconv_model(
    model: nn.Module,
    policy: str | Mapping[str, Any] | DeconvPolicy | None = None,
    *,
    family: DeconvPolicy = SMALL_BATCH_DEFAULTS,
    in_place: bool = False,
    example_inputs: Inputs | None = None,
) -> "ConversionReport":
    """Replace convolutions and the classifier by whitening layers and take the batch norms out, in place.

    What the policy leaves plain stays as it is, under the preset 'fast' the layers of squeeze-excite modules. A batch
    norm goes where whitening takes its place in what follows: where its output is read by whitened layers, through
    activations, poolings, sums and so on. A norm that a plain layer reads stays, and the report says which and why.

    Weights, hooks and `requires_grad` are kept, missing biases added as zeros, whitening starts at the identity. The
    function is not kept: for a network that was trained with batch norm call `transfer`; the report reminds of it.
    `BatchNorm2d` becomes `Identity`, `BatchNormAct2d` its activation. A timm network is afterwards saved by the name
    `deconv` and loads as such. Methods of its blocks that would fold batch norms (`fuse`, `reparameterize`,
    `switch_to_deploy`) fold whitening instead.

    To see what reads what, the network is run once on an input without data. For networks that cannot be run this way,
    roles are taken from shapes only, norms are judged by the layers beside them, and the report says it.

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
    check_convertible(model)
    flows, unseen = observe_what_runs(model, example_inputs)
    plan = make_plan(model, requested, requested.over_published(family), flows, batch_norms(model))
    trained = any(_has_statistics(model.get_submodule(name)) for name in plan.removed)
    report = apply_plan(model, plan, in_place=in_place)
    report.unseen, report.trained = unseen, trained
    return report


def check_convertible(model: nn.Module) -> None:
    """Check that a network is not converted already, nor wrapped.

    Raises:
        InputError: it is.
    """
    kind = type(model).__name__
    if isinstance(model, ConvertedNetwork):
        raise InputError(f"this {kind} is a deconvolution network already: create a new one and convert it")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InputError(f"{kind} wraps the network: convert it before it is wrapped")


def apply_plan(model: nn.Module, plan: Plan, *, in_place: bool = False) -> "ConversionReport":
    """Change a network as the plan says, in place, and report."""
    report = ConversionReport(
        parameters_before=_count_parameters(model),
        skipped=plan.skipped,
        norms=plan.removed,
        norms_kept=list(plan.staying.items()),
    )
    methods = folding_methods(model)
    new = {}
    for name, (role, cfg) in plan.whitened.items():
        layer = model.get_submodule(name)
        new[layer] = whitened_form(layer, cfg)
        kind, part = type(new[layer]).__name__, new[layer].blocks
        report.converted.append(ConvertedLayer(name, role, kind, part.number, part.features, str(cfg)))
    replace_modules(model, new)
    remove_norms(model, plan.removed)
    others = ((name, m) for name, m in model.named_modules() if is_any_norm(m) and name not in plan.staying)
    report.norms_left = [(name, type(module).__name__) for name, module in others]
    if not in_place:
        write_out_of_place(model)
    extend_network(model, plan.requested, plan.policy)
    override_folding(methods)
    share_notices(model)
    report.parameters_after = _count_parameters(model)
    return report


def _has_statistics(norm: nn.Module) -> bool:
    """Tell whether a batch norm's running mean is no longer the initial one."""
    mean = getattr(norm, "running_mean", None)
    return mean is not None and not mean.is_meta and bool(mean.any())


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class ConvertedLayer:
    """A whitened layer: `blocks` of `features` each; `options` is what differs from the published settings."""

    name: str
    role: str
    kind: str
    blocks: int
    features: int
    options: str


@dataclass
class ConversionReport:
    """What a conversion did, layer by layer; prints as a table.

    Attributes:
        converted: whitened layers in network order.
        skipped: (name, reason) of the layers with a weight matrix that were left plain.
        norms: names of the batch norms taken out.
        norms_kept: (name, reason) of the batch norms that stay, as a plain layer reads them.
        norms_left: (name, class) of the other normalisation layers, which stay.
        affine: names of the batch norms that stay as a scale and shift of each channel (`transfer`).
        unseen: why the network did not run to its end, if it did not: roles of what was not computed were taken from
            shapes only, and norms judged by the layers beside them.
        trained: whether the batch norms that were taken out held trained statistics.
        parameters_before, parameters_after: counts.
    """

    parameters_before: int
    parameters_after: int = 0
    converted: list[ConvertedLayer] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    norms_kept: list[tuple[str, str]] = field(default_factory=list)
    norms_left: list[tuple[str, str]] = field(default_factory=list)
    affine: list[str] = field(default_factory=list)
    unseen: str | None = None
    trained: bool = False

    def __str__(self) -> str:
        rows = [("layer", "role", "becomes", "blocks x features", "options")]
        rows += [(c.name, c.role, c.kind, f"{c.blocks} x {c.features}", c.options) for c in self.converted]
        rows += [(name, "", "(plain)", "", reason) for name, reason in self.skipped]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> list[str]:
        lines = [
            f"{len(self.converted)} layers whitened, {len(self.skipped)} left plain, {len(self.norms)} batch norms"
            f" removed, {self.parameters_before:,} -> {self.parameters_after:,} parameters"
        ]
        if self.trained:
            lines.append(
                "the batch norms were trained, and the network computes another function without them:"
                " timm_deconv.transfer takes a trained network over as it is"
            )
        if self.affine:
            lines.append(f"{len(self.affine)} of the batch norms left as scale and shift")
        if self.norms_kept:
            lines.append(f"{len(self.norms_kept)} batch norms stay:")
            lines += [f"  {name}: {reason}" for name, reason in self.norms_kept]
        if self.unseen:
            lines.append(
                f"roles of what did not run are by shape alone, norms by the layers beside them: {self.unseen}"
            )
        if self.norms_left:
            kinds = sorted(Counter(kind for _, kind in self.norms_left).items())
            lines.append("other norms, left as they are: " + ", ".join(f"{n} {kind}" for kind, n in kinds))
        return lines
