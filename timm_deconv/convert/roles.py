"""The part a layer plays in a network: stem, classifier, squeeze-excite, and so on."""

from collections.abc import Iterator

from timm.layers import Linear as TimmLinear
from timm.layers import SelectAdaptivePool2d
from timm.models.vgg import ConvMlp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .policy import Role

__all__ = [
    "LINEAR_TYPES",
    "block_ends",
    "classifier_names",
    "find_roles",
    "linear_layers_as_convs",
    "other_norms",
    "token_linears",
]

LINEAR_TYPES = (nn.Linear, TimmLinear)
"""The classes whose instances are linear layers and nothing more."""

RESIDUAL_SIGNS = ("downsample", "shortcut", "skip", "drop_path", "drop_path1")
"""What the residual blocks of timm, torchvision and most others have as a submodule or attribute, be it None."""

NO_BLOCK = ("blocks", "reparameterize")
"""What stages of blocks have, and blocks of parallel convolutions, such as those of RepVGG."""

WITHOUT_A_SIGN = ("DenseLayer", "DualPathBlock")
"""In the class names of blocks that have none of the signs: DenseNet's everywhere and timm's of DPN."""

BESIDE_THE_BRANCH = ("downsample", "shortcut", "skip", "se", "attn")
"""Submodules of a residual block that its branch does not end with."""

SQUEEZE_EXCITES = ("SEModule", "SqueezeExcite", "SqueezeExcitation", "EffectiveSE")


def find_roles(model: nn.Module) -> dict[str, Role]:
    """Role of every layer with a weight matrix by name, in network order; a module used twice is named once.

    Layers of squeeze-excite modules that hold a batch norm have the role of their shape: as it goes, whitening is to
    take its place.
    """
    stems, classifiers = _stem_names(model), classifier_names(model)
    excites, ends = _excites_without_norm(model), block_ends(model)
    hidden = {name for name in linear_layers_as_convs(model) if name not in classifiers}
    roles: dict[str, Role] = {}
    for name, module in _weighted_layers(model):
        if name in classifiers:
            roles[name] = "classifier"
        elif name in stems:
            roles[name] = "stem"
        elif name in hidden:
            roles[name] = "linear"
        elif name.startswith(excites):
            roles[name] = "squeeze_excite"
        else:
            role = _role_by_shape(module)
            roles[name] = "block_end" if name in ends and role in ("pointwise", "spatial") else role
    return roles


def block_ends(model: nn.Module) -> set[str]:
    """Names of the last convolutions of residual branches and dense layers: what is added or appended to an input.

    A block is a module of several convolutions with one of `RESIDUAL_SIGNS` and not `NO_BLOCK`, or of a class
    `WITHOUT_A_SIGN`, with no such block inside. Its branch is all but its squeeze-excite modules and what is
    `BESIDE_THE_BRANCH`, in the order in which they were made. Where that is not the order of computation, or blocks
    have no sign, another convolution or none is found.
    """
    branches = {
        prefix: convs
        for prefix, module in model.named_modules()
        if _is_block(module) and len(convs := _branch(prefix, module)) > 1
    }
    outer = {prefix for prefix in branches if any(_is_inside(other, prefix) for other in branches)}
    return {convs[-1] for prefix, convs in branches.items() if prefix not in outer}


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's layers, as `get_classifier()` gives them or as the default_cfg says.

    Of a classifier of several layers, such as norm and linear layer, it is the last layer with a weight matrix.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()  # type: ignore[operator]
        parts = found if isinstance(found, tuple | list) else (found,)
    else:
        modules = dict(model.named_modules(remove_duplicate=False))
        parts = [modules.get(name) for name in _cfg_names(model, "classifier")]
    last = (_last_layer(part) for part in parts if isinstance(part, nn.Module))
    return tuple(names[id(layer)] for layer in last if id(layer) in names)


def linear_layers_as_convs(model: nn.Module) -> set[str]:
    """Names of the linear layers that the network holds as convolutions: classifiers behind pooling, timm's VGG."""
    pooled = any(isinstance(module, SelectAdaptivePool2d) and not module.is_identity() for module in model.modules())
    held = {name for name in classifier_names(model) if pooled} | {
        f"{prefix}.{key}"
        for prefix, module in model.named_modules()
        if isinstance(module, ConvMlp)
        for key in ("fc1", "fc2")
    }
    return {name for name in held if isinstance(model.get_submodule(name), nn.Conv2d)}


def token_linears(model: nn.Module) -> set[str]:
    """Names of hidden linear layers that batch norm has nothing to do with, as in transformer blocks.

    None in a network without other norms than batch norm. Else all but those that have a batch norm beside them in the
    same module, as the layers of LeViT do.
    """
    if not other_norms(model):
        return set()
    beside = {id(m) for m in model.modules() if any(isinstance(child, _BatchNorm) for child in m.children())}
    return {
        f"{prefix}.{key}".lstrip(".")
        for prefix, parent in model.named_modules()
        if id(parent) not in beside
        for key, child in parent.named_children()
        if isinstance(child, nn.Linear)
    }


def other_norms(model: nn.Module) -> list[tuple[str, str]]:
    """(name, class) of the normalisation layers that are not torch's batch norms: LayerNorm, EvoNorm and so on."""
    return [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and not isinstance(module, _BatchNorm) and _has_own_state(module)
    ]


def _is_block(module: nn.Module) -> bool:
    if any(hasattr(module, name) for name in NO_BLOCK):
        return False
    named = any(name in type(module).__name__ for name in WITHOUT_A_SIGN)
    return named or any(hasattr(module, sign) for sign in RESIDUAL_SIGNS)


def _is_inside(name: str, prefix: str) -> bool:
    return name != prefix and (not prefix or name.startswith(f"{prefix}."))


def _branch(prefix: str, block: nn.Module) -> list[str]:
    """Names of a block's convolutions, without those of squeeze-excite modules and beside the branch."""
    aside = (*_prefixes(block, SQUEEZE_EXCITES), *(f"{name}." for name in BESIDE_THE_BRANCH))
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Conv2d)]
    return [f"{prefix}.{name}".lstrip(".") for name in names if not f"{name}.".startswith(aside)]


def _weighted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            yield name, module
        elif not isinstance(module, nn.Embedding | nn.EmbeddingBag) and "Norm" not in type(module).__name__:
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim > 1:
                yield name, module


def _last_layer(module: nn.Module) -> nn.Module | None:
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return layers[-1] if layers else None


def _stem_names(model: nn.Module) -> tuple[str, ...]:
    named = tuple(name for name in _cfg_names(model, "first_conv") if name)
    first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), "")
    return named or (first,)


def _cfg_names(model: nn.Module, key: str) -> tuple[str, ...]:
    cfg = getattr(model, "pretrained_cfg", None)
    value = cfg.get(key) if isinstance(cfg, dict) else None
    return (value,) if isinstance(value, str) else tuple(value or ())


def _prefixes(model: nn.Module, classes: tuple[str, ...]) -> tuple[str, ...]:
    named = (name for name, module in model.named_modules() if type(module).__name__.startswith(classes))
    return tuple(f"{name}." for name in named if name)


def _excites_without_norm(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the squeeze-excite modules that hold no batch norm."""
    return tuple(
        prefix
        for prefix in _prefixes(model, SQUEEZE_EXCITES)
        if not any(isinstance(module, _BatchNorm) for module in model.get_submodule(prefix[:-1]).modules())
    )


def _role_by_shape(module: nn.Module) -> Role:
    if not isinstance(module, nn.Conv2d):
        return "linear" if isinstance(module, nn.Linear) else "spatial"
    if module.groups > 1:
        return "depthwise" if module.groups == module.in_channels else "grouped"
    return "pointwise" if module.kernel_size == (1, 1) else "spatial"


def _has_own_state(module: nn.Module) -> bool:
    return bool(module._parameters or module._buffers)
