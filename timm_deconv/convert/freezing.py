"""freeze, unfreeze: parameters and statistics of a network or parts of it, batch norms and whitening layers alike."""

from collections.abc import Iterable

import timm.utils
from torch import nn

from timm_deconv.errors import unknown_name
from timm_deconv.layers import ChannelDeconv, WhiteningMixin

__all__ = ["freeze", "freeze_statistics", "unfreeze"]


def freeze(
    root_module: nn.Module, submodules: str | Iterable[str] = (), include_bn_running_stats: bool = True
) -> None:
    """Freeze parameters, and the statistics of batch norms and whitening layers, as `timm.utils.freeze` does of batch
    norms alone.

    A frozen whitening layer uses its running values in training too and leaves them as they are.

    Args:
        root_module: a network, changed in place.
        submodules: names of the modules to freeze; the whole network if there are none.
        include_bn_running_stats: freeze the statistics too, not only the parameters.

    Raises:
        InputError: a name that the network does not have, with the nearest ones. Nothing is changed.
    """
    names = _checked(root_module, submodules)
    timm.utils.freeze(root_module, names, include_bn_running_stats)
    if include_bn_running_stats:
        freeze_statistics(root_module, names)


def unfreeze(
    root_module: nn.Module, submodules: str | Iterable[str] = (), include_bn_running_stats: bool = True
) -> None:
    """Undo `freeze`; arguments and errors as there."""
    names = _checked(root_module, submodules)
    timm.utils.unfreeze(root_module, names, include_bn_running_stats)
    if include_bn_running_stats:
        freeze_statistics(root_module, names, frozen=False)


def freeze_statistics(root_module: nn.Module, submodules: Iterable[str] = (), *, frozen: bool = True) -> None:
    """Freeze the statistics of whitening layers alone, or let them live again: `submodules` or, if none, all."""
    for name in list(submodules) or [""]:
        for module in root_module.get_submodule(name).modules():
            if isinstance(module, WhiteningMixin | ChannelDeconv):
                module.statistics_frozen = frozen


def _checked(root_module: nn.Module, submodules: str | Iterable[str]) -> list[str]:
    names = [submodules] if isinstance(submodules, str) else list(submodules or ())
    known = {name for name, _ in root_module.named_modules(remove_duplicate=False)}
    for name in names:
        if name not in known:
            raise unknown_name("module", str(name), known - {""})
    return names
