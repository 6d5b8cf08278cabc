"""What becomes of an update whose loss, or gradient, is NaN or infinite: the run stops, leaves it out, or goes back."""

from collections.abc import Callable

import torch
from torch import nn

from timm_deconv.errors import NonFiniteError

from .recipe import Recipe

__all__ = ["Recovery"]


class Recovery:
    """Leaves updates out, as the recipe's `nonfinite` and `nonfinite_limit` say.

    Args:
        recipe: the settings.
        network: not wrapped. Its buffers are put back where an update is left out, as batch norms have averaged in
            what they saw.
        rewind: takes weights and optimiser back to the last checkpoint.
    """

    def __init__(self, recipe: Recipe, network: nn.Module, rewind: Callable[[], str]) -> None:
        self.mode, self.limit = recipe.nonfinite, recipe.nonfinite_limit
        self.rewind = rewind
        self.spoilt = False
        self.buffers = list(network.buffers()) if self.active else []
        self.kept: list[torch.Tensor] = []

    @property
    def active(self) -> bool:
        """Whether a run goes on after NaN or infinity."""
        return self.mode != "stop"

    def begin_pass(self, first: bool) -> None:
        """Keep the buffers as they are before the first pass of an update."""
        if first:
            self.spoilt = False
            self.kept = [buffer.clone() for buffer in self.buffers]

    def spoil(self, error: NonFiniteError, left_out: int) -> None:
        """Note that the update will be left out.

        Args:
            error: what was seen.
            left_out: updates of the run that were left out before.

        Raises:
            NonFiniteError: the recipe says to stop, or so many have been left out already.
        """
        if not self.active:
            raise error
        if left_out >= self.limit:
            raise NonFiniteError(
                f"{error}; {left_out} updates were left out before, which is nonfinite_limit={self.limit}"
            ) from error
        self.spoilt = True

    @torch.no_grad()
    def undo(self) -> str:
        """Undo what an update that is left out has changed; return what was done, in words."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)
        return (
            "left out" if self.mode == "skip" else f"left out; weights and optimiser are again those of {self.rewind()}"
        )
