"""convert_deconv_model: any batch-norm network becomes a deconvolution network, in place."""

from collections.abc import Iterator, Mapping
from typing import Any

from timm.layers import BatchNormAct2d
from torch import nn

from ..errors import InputError
from ..layers import ChannelDeconv, Deconv2d, DeconvCfg, DeconvLinear, WhiteningMixin
from .classifier import mix_in, whiten_pooling
from .policy import DeconvPolicy, Role, resolve_policy
from .report import ConversionReport, ConvertedLayer
from .roles import find_roles

__all__ = ["convert_deconv_model"]

Plan = dict[str, tuple[Role, DeconvCfg]]


def convert_deconv_model(model: nn.Module, policy: str | Mapping[str, Any] | DeconvPolicy | None = None) -> ConversionReport:
    """Replace convolutions and the classifier by whitening layers and take the batch norms out, in place.

    Weights are kept, missing biases added as zeros, whitening starts at the identity. `BatchNorm2d` becomes `Identity`,
    `BatchNormAct2d` its activation; activations stop writing in place, as what they would overwrite may be shared once the norm
    before them is gone.

    Args:
        model: a network with `nn.Conv2d` or `nn.Linear` layers, timm's or any other, on any device (meta too).
        policy: a preset's name, a dictionary of options, or a `DeconvPolicy`; None for the default preset.

    Returns:
        The report, printable as a table.

    Raises:
        InputError: nothing to convert, a pattern that matches no layer, or an option that makes no sense. The model is unchanged.
    """
    policy = resolve_policy(policy)
    plan, skipped = _plan(model, policy)
    report = ConversionReport(parameters_before=_count_parameters(model), skipped=skipped)
    for name, (role, cfg) in plan.items():
        report.converted.append(_convert_layer(model, name, role, cfg))
    if policy.classifier == "channel":
        whiten_pooling(model, ChannelDeconv(model.num_features, cfg=policy.channel_cfg()))  # type: ignore[arg-type]
    report.norms = _remove_norms(model)
    _write_out_of_place(model)
    mix_in(model, policy)
    report.parameters_after = _count_parameters(model)
    return report


def _plan(model: nn.Module, policy: DeconvPolicy) -> tuple[Plan, list[tuple[str, str]]]:
    """What to whiten and what to leave plain, decided before anything is changed."""
    roles = find_roles(model)
    policy.check_patterns(roles)
    plan: Plan = {}
    skipped = []
    for name, role in roles.items():
        reason = _reason_to_skip(model.get_submodule(name), role, policy)
        cfg = policy.cfg(name, role)
        if reason is None and cfg is not None:
            plan[name] = (role, cfg)
        else:
            skipped.append((name, reason or "left plain by the policy"))
    if not plan:
        raise InputError(f"nothing to convert in {type(model).__name__}: it has no plain convolution or linear layer to whiten")
    return plan, skipped


def _reason_to_skip(module: nn.Module, role: Role, policy: DeconvPolicy) -> str | None:
    if isinstance(module, WhiteningMixin):
        return "whitened already"
    if role == "classifier" and policy.classifier != "linear":
        return f"classifier={policy.classifier!r}"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} has no whitening form"
    return None


def _convert_layer(model: nn.Module, name: str, role: Role, cfg: DeconvCfg) -> ConvertedLayer:
    plain = model.get_submodule(name)
    layer: Deconv2d | DeconvLinear
    if isinstance(plain, nn.Conv2d):
        layer = Deconv2d.from_conv(plain, cfg)
    else:
        assert isinstance(plain, nn.Linear)
        layer = DeconvLinear.from_linear(plain, cfg)
    _replace(model, plain, layer)
    return ConvertedLayer(name, role, type(layer).__name__, layer.partition.blocks, layer.partition.features, str(cfg))


def _remove_norms(model: nn.Module) -> list[str]:
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for _, norm in norms:
        _replace(model, norm, _without_norm(norm))
    return [name for name, _ in norms]


def _without_norm(norm: nn.Module) -> nn.Module:
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity()
    dropped = isinstance(norm.drop, nn.Identity)
    return norm.act if dropped else nn.Sequential(norm.drop, norm.act)


def _write_out_of_place(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place where `old` stands: a module may be used more than once."""
    for parent, key in list(_places(model, old)):
        parent._modules[key] = new


def _places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is module:
                yield parent, key


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
