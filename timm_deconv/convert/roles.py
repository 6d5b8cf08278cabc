"""The part a layer plays in a network: stem, classifier, squeeze-excite, and so on."""

from torch import nn

from .policy import Role

__all__ = ["classifier_names", "find_roles"]


def find_roles(model: nn.Module) -> dict[str, Role]:
    """Role of every convolution and linear layer by name, in network order; a module used twice is named once."""
    stems, classifiers = _stem_names(model), classifier_names(model)
    excites = _squeeze_excite_prefixes(model)
    roles: dict[str, Role] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if name in classifiers:
            roles[name] = "classifier"
        elif name in stems:
            roles[name] = "stem"
        elif name.startswith(excites):
            roles[name] = "squeeze_excite"
        else:
            roles[name] = _role_by_shape(module)
    return roles


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's layers, as `get_classifier()` gives them or as the default_cfg says."""
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        modules = found if isinstance(found, tuple | list) else (found,)
        names = {id(module): name for name, module in model.named_modules()}
        return tuple(names[id(m)] for m in modules if isinstance(m, nn.Conv2d | nn.Linear) and id(m) in names)
    return _cfg_names(model, "classifier")


def _stem_names(model: nn.Module) -> tuple[str, ...]:
    named = tuple(name for name in _cfg_names(model, "first_conv") if name)
    first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), "")
    return named or (first,)


def _cfg_names(model: nn.Module, key: str) -> tuple[str, ...]:
    value = (getattr(model, "pretrained_cfg", None) or {}).get(key) or ()
    return (value,) if isinstance(value, str) else tuple(value)


def _squeeze_excite_prefixes(model: nn.Module) -> tuple[str, ...]:
    marks = ("SEModule", "SqueezeExcite", "SqueezeExcitation", "EffectiveSE")
    return tuple(f"{name}." for name, module in model.named_modules() if name and type(module).__name__.startswith(marks))


def _role_by_shape(module: nn.Conv2d | nn.Linear) -> Role:
    if isinstance(module, nn.Linear):
        return "linear"
    if module.groups > 1:
        return "depthwise" if module.groups == module.in_channels else "grouped"
    return "pointwise" if module.kernel_size == (1, 1) else "spatial"
