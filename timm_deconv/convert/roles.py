"""The part a layer plays in a network: stem, classifier, squeeze-excite, and so on."""

from collections.abc import Sequence

from timm.layers import SelectAdaptivePool2d
from timm.models.vgg import ConvMlp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .flow import Flow, observe_what_runs
from .module_types import is_any_norm, weighted_layers
from .policy import Role

__all__ = ["block_ends", "classifier_names", "find_roles", "linear_layers_as_convs", "token_linears"]


def find_roles(model: nn.Module, flows: Sequence[Flow] | None = None) -> dict[str, Role]:
    """Find the role of every layer with a weight matrix, in network order; a module used twice is named once.

    Squeeze-excites and block ends are taken from what the network computes. Layers of squeeze-excites that hold a batch
    norm have the role of their shape: as it goes, whitening is to take its place.

    Args:
        model: any network.
        flows: what it computes; by default it is run to see. Layers that were not run have the roles that shapes and
            timm's configuration say.
    """
    flows = _observed(model, flows)
    stems, classifiers = _stem_names(model, flows), classifier_names(model, flows)
    excites, ends = _excites_without_norm(flows), block_ends(model, flows)
    hidden = linear_layers_as_convs(model, flows)
    roles: dict[str, Role] = {}
    for name, module in weighted_layers(model):
        if name in classifiers:
            roles[name] = "classifier"
        elif name in stems:
            roles[name] = "stem"
        elif name in hidden:
            roles[name] = "linear"
        elif name in excites:
            roles[name] = "squeeze_excite"
        else:
            role = _role_by_shape(module)
            roles[name] = "block_end" if name in ends and role in ("pointwise", "spatial") else role
    return roles


def block_ends(model: nn.Module, flows: Sequence[Flow] | None = None) -> set[str]:
    """Find the layers that residual branches, dense layers and linear bottlenecks end with; see `Flow.block_ends`."""
    return set().union(*(flow.block_ends() for flow in _observed(model, flows)))


def classifier_names(model: nn.Module, flows: Sequence[Flow] | None = None) -> tuple[str, ...]:
    """Find the classifier's layers: as timm's `get_classifier()` says, else what the output comes of.

    A classifier of several layers, such as norm and linear layer, is named by its last convolution or linear layer.
    """
    if not hasattr(model, "get_classifier"):
        return tuple(dict.fromkeys(name for flow in _observed(model, flows) for name in flow.heads()))
    found = model.get_classifier()  # type: ignore[operator]
    parts = [part for part in (found if isinstance(found, tuple | list) else (found,)) if isinstance(part, nn.Module)]
    layers = [[m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear)] for part in parts]
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[held[-1]] for held in layers if held and held[-1] in names)


def linear_layers_as_convs(model: nn.Module, flows: Sequence[Flow] | None = None) -> set[str]:
    """Find the linear layers that the network holds as convolutions: classifiers behind pooling, timm's VGG."""
    pooled = any(isinstance(module, SelectAdaptivePool2d) and not module.is_identity() for module in model.modules())
    held = set(classifier_names(model, flows)) if pooled else set()
    for prefix, module in model.named_modules():
        if isinstance(module, ConvMlp):
            held |= {f"{prefix}.fc1", f"{prefix}.fc2"}
    return {name for name in held if isinstance(model.get_submodule(name), nn.Conv2d)}


def token_linears(model: nn.Module) -> set[str]:
    """Find the hidden linear layers that batch norm has nothing to do with, as in transformer blocks.

    There are none in a network without other norms than batch norm. Else it is all but those that have a batch norm
    beside them in the same module, as the layers of LeViT do.
    """
    if not any(is_any_norm(module) and not isinstance(module, _BatchNorm) for module in model.modules()):
        return set()
    return {
        f"{prefix}.{key}".lstrip(".")
        for prefix, parent in model.named_modules()
        if not any(isinstance(child, _BatchNorm) for child in parent.children())
        for key, child in parent.named_children()
        if isinstance(child, nn.Linear)
    }


def _observed(model: nn.Module, flows: Sequence[Flow] | None) -> Sequence[Flow]:
    return observe_what_runs(model)[0] if flows is None else flows


def _stem_names(model: nn.Module, flows: Sequence[Flow]) -> tuple[str, ...]:
    cfg = getattr(model, "pretrained_cfg", None)
    if named := cfg.get("first_conv") if isinstance(cfg, dict) else None:
        return (named,) if isinstance(named, str) else tuple(named)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    computed = (step.name for flow in flows for step in flow.steps if step.kind == "layer" and step.name in convs)
    return (next(computed, convs[0] if convs else ""),)


def _excites_without_norm(flows: Sequence[Flow]) -> set[str]:
    """Return the names of the layers of squeeze-excites that hold no batch norm."""
    found: set[str] = set()
    for flow in flows:
        for excite in flow.excites:
            steps = [flow.steps[index] for index in excite]
            if not any(step.kind == "norm" and isinstance(flow.modules[step.name], _BatchNorm) for step in steps):
                found |= {step.name for step in steps if step.kind == "layer"}
    return found


def _role_by_shape(module: nn.Module) -> Role:
    if not isinstance(module, nn.Conv2d):
        return "linear" if isinstance(module, nn.Linear) else "spatial"
    if module.groups > 1:
        return "depthwise" if module.groups == module.in_channels else "grouped"
    return "pointwise" if module.kernel_size == (1, 1) else "spatial"
