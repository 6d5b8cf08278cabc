"""What a conversion is going to do with every layer and norm, decided before anything is changed."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers import DeconvCfg

from .effect import check_effect
from .norms import Layers, reasons_to_stay
from .policy import DeconvPolicy, Role
from .roles import classifier_names, find_roles, linear_layers_as_convs, token_linears
from .surgery import why_not_whitened
from .trace import Inputs, RunError, Trace, trace_network

__all__ = ["Plan", "decide", "look_at"]


@dataclass
class Plan:
    """What becomes of a network.

    Attributes:
        whitened: name of a layer -> its role and configuration.
        skipped: (name, reason) of the layers that stay plain.
        removed: names of the norms that go.
        staying: name of a norm -> why it stays.
    """

    whitened: dict[str, tuple[Role, DeconvCfg]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    staying: dict[str, str] = field(default_factory=dict)


def look_at(model: nn.Module, example_inputs: Inputs | None) -> tuple[Trace, str | None]:
    """What a network computes and, where it does not run to its end, why; on inputs that the user gives it must."""
    try:
        return trace_network(model, example_inputs=example_inputs), None
    except RunError as error:
        if example_inputs is not None:
            raise
        return (error.so_far,) if error.so_far.steps else (), str(error)


def decide(model: nn.Module, requested: DeconvPolicy, policy: DeconvPolicy, trace: Trace, norms: Iterable[str]) -> Plan:
    """What to whiten, what to leave plain, and which of the norms go.

    Args:
        model: the network.
        requested: the part of the policy that the user asked for, which is judged.
        policy: with what lies beneath it.
        trace: what the network computes, as far as that is known.
        norms: names of the norms in question.

    Raises:
        InputError: nothing to convert, a pattern that matches no layer, or an option without effect.
    """
    roles = find_roles(model, trace)
    policy.check_patterns(roles)
    convs, tokens = linear_layers_as_convs(model, trace), token_linears(model)
    plan = Plan()
    for name, role in roles.items():
        reason = _reason_to_skip(name, model.get_submodule(name), role, policy, name in tokens)
        cfg = policy.cfg(name, role, linear_as_conv=name in convs)
        if reason is None and cfg is not None:
            plan.whitened[name] = (role, cfg)
        else:
            plan.skipped.append((name, reason or "left plain by the policy"))
    if not plan.whitened:
        raise InputError(_nothing(model, plan.skipped))
    if "" in plan.whitened:
        raise InputError(f"a {type(model).__name__} alone is no network: use Deconv2d or DeconvLinear in its place")
    check_effect(model, requested, roles, plan.whitened, convs)
    classifiers = classifier_names(model, trace)
    layers = Layers(plan.whitened.keys(), classifiers, pooling=policy.classifier == "channel")
    plan.staying = reasons_to_stay(model, trace, layers, norms)
    plan.removed = [name for name in norms if name not in plan.staying]
    return plan


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
