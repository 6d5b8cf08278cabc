"""What is done with a network of carried-over weights before whoever asked for it has it: `python -m timm_deconv` sets
it, as the script that it runs knows nothing of this package."""

from collections.abc import Callable

from torch import nn

from timm_deconv.layers.notices import share_notices

__all__ = ["created", "when_carried_over"]

Action = Callable[[nn.Module], object]

_actions: list[Action] = []


def when_carried_over(action: Action) -> None:
    """Let `action` be called with every network that is created with weights whose layers have seen no images."""
    _actions.append(action)


def created(model: nn.Module) -> nn.Module:
    """The network as it is handed out."""
    for action in _actions if share_notices(model).uncalibrated else ():
        action(model)
    return model
