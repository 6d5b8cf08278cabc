"""What a user writes in a policy does something in the network, or he is told."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.layers import DeconvCfg
from timm_deconv.layers.config import Kind, conv_kind
from timm_deconv.layers.presets import LINEAR_AS_CONV

from .policy import DeconvPolicy, Role

__all__ = ["check_effect"]

Plan = Mapping[str, tuple[Role, DeconvCfg]]
Scope = tuple[str, Mapping[str, Any], list[str]]


def check_effect(
    model: nn.Module, policy: DeconvPolicy, roles: Mapping[str, Role], plan: Plan, convs: Collection[str]
) -> None:
    """Refuse options that do nothing in any layer that they are for; warn of roles that no layer has.

    What a saved configuration says is not judged, nor what lies beneath the policy.

    Args:
        model: the network, as yet unchanged.
        policy: what the user wrote.
        roles: of all layers by name.
        plan: role and configuration of the layers that are going to be whitened.
        convs: names of linear layers that the network holds as convolutions.

    Raises:
        InputError: an option without effect, and why.
    """
    if policy.version is not None or policy.beneath is not None:
        return
    _warn_of_roles(model, policy, set(roles.values()))
    kinds = {name: _kind(model.get_submodule(name)) for name in plan}
    for where, options, names in _scopes(policy, plan):
        for option, value in options.items():
            if value == getattr(DeconvCfg, option):
                continue
            fixed = convs if not where and option in LINEAR_AS_CONV else ()
            reasons = [_why_idle(option, plan[name][1], "linear" if name in fixed else kinds[name]) for name in names]
            if not where and policy.classifier == "channel":
                reasons.append(_why_idle(option, policy.channel_cfg(), "channel"))
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


def _scopes(policy: DeconvPolicy, plan: Plan) -> Iterator[Scope]:
    """(where, options, names of the whitened layers that they are for) of everything that the policy says."""
    yield "", policy.options, list(plan)
    for role, options in policy.roles.items():
        yield f" of the role {role!r}", options or {}, [name for name, (own, _) in plan.items() if own == role]
    for pattern, options in policy.patterns.items():
        yield f" that matches {pattern!r}", options or {}, [name for name in plan if fnmatchcase(name, pattern)]


def _kind(layer: nn.Module) -> Kind:
    if isinstance(layer, nn.Conv2d):
        return conv_kind(layer.in_channels, layer.kernel_size, layer.groups)  # type: ignore[arg-type]
    return "linear"


def _why_idle(option: str, cfg: DeconvCfg, kind: Kind) -> str | None:
    if option == "quartic":
        return None if cfg.quartic else f"n_iter is {cfg.n_iter}; it is for 2 or 3 steps"
    return cfg.idle(kind).get(option)
