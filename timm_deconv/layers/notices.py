"""Warnings of a network's layers to its user: each of them once a network, in one line."""

import warnings

from torch import nn

__all__ = ["LIVE_STATISTICS", "OTHER_SETTINGS", "UNCALIBRATED", "Notices", "share_notices"]

UNCALIBRATED = (
    "weights that were folded, or transferred from batch norm, start training from another function, as whitening has"
    " seen no images yet: call timm_deconv.calibrate(model, loader) before the optimiser is made, or run the script by"
    " 'python -m timm_deconv --calibrate DATA SCRIPT.py'"
)
OTHER_SETTINGS = (
    "weights trained under other whitening settings than the network's were folded: in evaluation the function is the"
    " same, and whitening starts at the identity"
)
LIVE_STATISTICS = (
    "whitening layers have frozen parameters but live statistics, which requires_grad does not stop:"
    " timm_deconv.freeze(model) stops both"
)


class Notices:
    """Memory of what has been said of a network, shared by its whitening layers; copied and pickled with them.

    Attributes:
        uncalibrated: the weights were folded, or transferred from batch norm, and no images were seen since.
    """

    def __init__(self) -> None:
        self.uncalibrated = False
        self._said: set[str] = set()

    def say(self, message: str) -> None:
        """Warn of something that was not said before."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)


def share_notices(model: nn.Module) -> Notices:
    """Give all whitening layers of a network, which get to know their names, one `Notices` and return it."""
    modules = model.named_modules()
    layers = {name: layer for name, layer in modules if isinstance(getattr(layer, "notices", None), Notices)}
    found = [layer.notices for layer in layers.values()]
    shared = next((notices for notices in found if notices.uncalibrated), found[0] if found else Notices())
    for name, layer in layers.items():
        layer.notices, layer.label = shared, name
    return shared
