"""What a conversion is going to do with every layer and norm, decided before anything is changed."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers import DeconvCfg
from timm_deconv.layers.config import Kind, conv_kind
from timm_deconv.layers.presets import LINEAR_AS_CONV

from .flow import Flow
from .module_replace import why_not_whitened
from .module_types import FROZEN_TYPES, is_batch_norm, weighted_layers
from .policy import DeconvPolicy, Role
from .roles import classifier_names, find_roles, linear_layers_as_convs, token_linears

__all__ = ["Plan", "make_plan"]

Whitened = dict[str, tuple[Role, DeconvCfg]]


@dataclass
class Plan:
    """What becomes of a network.

    Attributes:
        requested: the part of the policy that the user asked for.
        policy: with what lies beneath it.
        whitened: name of a layer -> its role and configuration.
        skipped: (name, reason) of the layers that stay plain.
        removed: names of the norms that go.
        staying: name of a norm -> why it stays.
    """

    requested: DeconvPolicy
    policy: DeconvPolicy
    whitened: Whitened = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    staying: dict[str, str] = field(default_factory=dict)


def make_plan(
    model: nn.Module, requested: DeconvPolicy, policy: DeconvPolicy, flows: Sequence[Flow], norms: Iterable[str]
) -> Plan:
    """Decide what to whiten, what to leave plain, and which of the norms go.

    Args:
        model: the network.
        requested: the part of the policy that the user asked for, which is judged.
        policy: with what lies beneath it.
        flows: what the network computes, as far as that is known.
        norms: names of the norms in question.

    Raises:
        InputError: nothing to convert, a pattern that matches no layer, or an option without effect.
    """
    roles = find_roles(model, flows)
    policy.check_patterns(roles)
    convs, tokens = linear_layers_as_convs(model, flows), token_linears(model)
    plan = Plan(requested, policy)
    for name, role in roles.items():
        reason = _reason_to_skip(name, model.get_submodule(name), role, policy, name in tokens)
        cfg = policy.cfg(name, role, linear_as_conv=name in convs)
        if reason is None and cfg is not None:
            plan.whitened[name] = (role, cfg)
        else:
            plan.skipped.append((name, reason or "left plain by the policy"))
    _check_something_is_whitened(model, plan)
    _check_effect(model, requested, roles, plan.whitened, convs)
    plan.staying = _reasons_to_stay(model, flows, plan.whitened, classifier_names(model, flows), norms)
    plan.removed = [name for name in norms if name not in plan.staying]
    return plan


def _reason_to_skip(name: str, layer: nn.Module, role: Role, policy: DeconvPolicy, token_linear: bool) -> str | None:
    if role == "classifier" and policy.classifier != "linear":
        return f"classifier={policy.classifier!r}"
    if token_linear and role == "linear" and not policy.names(name, role):
        return "hidden linear layer without batch norm: name the role 'linear' to whiten it"
    return why_not_whitened(layer)


def _check_something_is_whitened(model: nn.Module, plan: Plan) -> None:
    kind = type(model).__name__
    if "" in plan.whitened:
        raise InputError(f"a {kind} alone is no network: use Deconv2d or DeconvLinear in its place")
    if not plan.whitened and not plan.skipped:
        raise InputError(f"nothing to convert in {kind}: it has no convolution or linear layer")
    if not plan.whitened:
        name, reason = plan.skipped[0]
        raise InputError(f"nothing to convert in {kind}: {len(plan.skipped)} layers are left plain ({name}: {reason})")


# Options without effect


def _check_effect(
    model: nn.Module, policy: DeconvPolicy, roles: Mapping[str, Role], whitened: Whitened, convs: Collection[str]
) -> None:
    """Refuse options that do nothing in any layer that they are for; warn of roles that no layer has.

    What a saved configuration says is not judged, nor what lies beneath the policy.
    """
    if policy.version is not None or policy.beneath is not None:
        return
    _warn_of_roles(model, policy, set(roles.values()))
    kinds = {name: _layer_kind(model.get_submodule(name)) for name in whitened}
    for where, options, names in _scopes(policy, whitened):
        for option, value in options.items():
            if value == getattr(DeconvCfg, option):
                continue
            as_linear = convs if not where and option in LINEAR_AS_CONV else ()
            reasons = [
                _why_idle(option, whitened[name][1], "linear" if name in as_linear else kinds[name]) for name in names
            ]
            if reasons and None not in reasons:
                raise InputError(f"{option}={value!r}: does nothing in any layer{where}: {reasons[0]}")


def _warn_of_roles(model: nn.Module, policy: DeconvPolicy, found: set[Role]) -> None:
    kind = type(model).__name__
    headless = getattr(model, "num_classes", None) == 0
    for role in policy.roles.keys() - found:
        if role != "classifier" or not headless:
            there = ", ".join(sorted(found))
            warnings.warn(f"roles: no layer of this {kind} is {role!r}; there are: {there}", stacklevel=5)
    if policy.classifier == "plain" and "classifier" not in found and not headless:
        warnings.warn(f"classifier='plain': no classifier was found in this {kind}", stacklevel=5)


def _scopes(policy: DeconvPolicy, whitened: Whitened) -> Iterator[tuple[str, Mapping[str, Any], list[str]]]:
    """Yield (where, options, names of the whitened layers that they are for) for everything that the policy says."""
    yield "", policy.options, list(whitened)
    for role, options in policy.roles.items():
        yield f" of the role {role!r}", options or {}, [name for name, (own, _) in whitened.items() if own == role]
    for pattern, options in policy.patterns.items():
        yield f" that matches {pattern!r}", options or {}, [name for name in whitened if fnmatchcase(name, pattern)]


def _layer_kind(layer: nn.Module) -> Kind:
    if isinstance(layer, nn.Conv2d):
        return conv_kind(layer.in_channels, layer.kernel_size, layer.groups)  # type: ignore[arg-type]
    return "linear"


def _why_idle(option: str, cfg: DeconvCfg, kind: Kind) -> str | None:
    if option == "quartic":
        return None if cfg.quartic else f"n_iter is {cfg.n_iter}; it is for 2 or 3 steps"
    return cfg.idle(kind).get(option)


# Norms that stay


def _reasons_to_stay(
    model: nn.Module,
    flows: Sequence[Flow],
    whitened: Collection[str],
    classifiers: Collection[str],
    norms: Iterable[str],
) -> dict[str, str]:
    """Find the norms that stay: name -> why.

    A norm goes where each way on from its output comes to a whitened layer or to another norm, through whatever stands
    between. Ways through a squeeze-excite do not count: what they end in is bounded. A way may also end in the
    network's output, or in a classifier that stays plain, if what the norm normalises comes out of whitened layers.

    For a norm that was not run, the layers beside it decide, in the order in which they were made.
    """
    judges = [_FlowJudge(flow, whitened, classifiers) for flow in flows]
    reasons = {}
    for name in norms:
        judged = [judge.reason(name) for judge in judges if name in judge.flow.run.calls]
        found = judged or [_reason_beside(model, name, whitened, classifiers)]
        if reason := next((reason for reason in found if reason), None):
            reasons[name] = reason
    return reasons


class _FlowJudge:
    """Knows of every value of a forward what plain layer reads it or made it, and whether it leaves the network."""

    def __init__(self, flow: Flow, whitened: Collection[str], classifiers: Collection[str]) -> None:
        self.flow = flow
        self.whitened = whitened
        self.classifiers = classifiers
        self.read_by: list[str | None] = [None] * len(flow.steps)
        self.leaves = [False] * len(flow.steps)
        self.made_by: list[str | None] = []
        for index in reversed(range(len(flow.steps))):
            self._judge_readers(index)
        for index in range(len(flow.steps)):
            self.made_by.append(self._maker(index))

    def reason(self, norm: str) -> str | None:
        """Return why a norm stays, or None."""
        for index in self.flow.run.calls[norm]:
            if reader := self.read_by[index]:
                return f"{reader} reads it and stays plain"
            maker = next((m for m in (self.made_by[i] for i in self.flow.steps[index].inputs) if m), None)
            if maker and self.leaves[index]:
                return f"{maker} before it stays plain, and no whitened layer follows"
        return None

    def _judge_readers(self, index: int) -> None:
        self.leaves[index] = index in self.flow.run.outputs
        for reader in self.flow.run.readers[index]:
            if reader in self.flow.side_steps and index not in self.flow.side_steps:
                continue
            step = self.flow.steps[reader]
            if step.kind == "product":
                self.read_by[index] = self.read_by[index] or f"a product with weights ({step.name})"
            elif step.kind == "layer" and step.name not in self.whitened:
                if step.name in self.classifiers:
                    self.leaves[index] = True
                else:
                    self.read_by[index] = self.read_by[index] or step.name
            elif self._passes_on(reader):
                self.read_by[index] = self.read_by[index] or self.read_by[reader]
                self.leaves[index] |= self.leaves[reader]

    def _passes_on(self, index: int) -> bool:
        """Return whether a value passes through a step: an operator or a frozen norm, which does not normalise."""
        step = self.flow.steps[index]
        if step.kind == "norm":
            return type(self.flow.modules[step.name]) in FROZEN_TYPES
        return step.kind == "op" and not step.name.startswith("native_")

    def _maker(self, index: int) -> str | None:
        """Return a plain layer that a value comes out of, with no whitened layer between."""
        step = self.flow.steps[index]
        if step.kind == "layer":
            return None if step.name in self.whitened else step.name
        if step.kind == "product":
            return f"a product with weights ({step.name})"
        if step.kind == "norm" and not is_batch_norm(self.flow.modules[step.name]):
            return None
        return next((m for m in (self.made_by[source] for source in self.flow.sources(index)) if m), None)


def _reason_beside(model: nn.Module, norm: str, whitened: Collection[str], classifiers: Collection[str]) -> str | None:
    """Judge a norm by the layers before and after it in the order in which the network's modules were made."""
    layers = dict(weighted_layers(model))
    order = [name for name, _ in model.named_modules() if name in layers or name == norm]
    place = order.index(norm)
    before, after = order[:place][-1:], order[place + 1 :][:1]
    if after and after[0] in classifiers and after[0] not in whitened:
        after = []
    neighbour = next(iter(after + before), None)
    if neighbour is None or neighbour in whitened:
        return None
    return f"{neighbour}, the layer {'after' if after else 'before'} it, stays plain"
