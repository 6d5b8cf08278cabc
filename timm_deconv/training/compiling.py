"""torch.compile, for the whole network or for its blocks one by one."""

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn

from timm_deconv.layers import WhiteningMixin

from .recipe import Recipe

__all__ = ["compile_regions", "compile_whole"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def compile_whole(recipe: Recipe) -> TorchDynamoPlugin | None:
    """Return by what accelerate compiles the network with what processes put around it; None leaves it to accelerate's
    own settings."""
    if recipe.torchcompile is None or recipe.torchcompile_regions:
        return None
    return TorchDynamoPlugin(backend=recipe.torchcompile, mode=recipe.torchcompile_mode)


def compile_regions(model: nn.Module, backend: str, mode: str | None) -> list[str]:
    """Compile blocks in place, each for itself: blocks of one class and shape share what is compiled.

    A block is a module of which its container (nn.Sequential, ...) holds several of the class; what has no such
    containers is compiled by its whitening layers. Processes exchange gradients of one block while the next is at work.

    Returns:
        The names of the blocks.
    """
    regions = _regions(model)
    limit = torch._dynamo.config.recompile_limit
    # blocks of one class share their code, and each shape of them, in training and evaluation, takes one of these
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(regions))
    for name in regions:
        model.get_submodule(name).compile(backend=backend, mode=mode)
    return regions


def _regions(module: nn.Module, name: str = "") -> list[str]:
    if isinstance(module, WhiteningMixin):
        return [name]
    children = {f"{name}.{child}".lstrip("."): part for child, part in module.named_children()}
    if isinstance(module, CONTAINERS):
        classes = [type(part) for part in children.values() if not isinstance(part, CONTAINERS)]
        repeated = {child for child, part in children.items() if classes.count(type(part)) > 1}
    else:
        repeated = set()
    found = []
    for child, part in children.items():
        is_block = child in repeated and next(part.parameters(), None) is not None
        found += [child] if is_block else _regions(part, child)
    return found
