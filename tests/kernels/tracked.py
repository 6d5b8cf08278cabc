"""Running values and batches for the tests of averaging these in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_deconv.kernels import Blocks, Window

__all__ = ["State", "a_batch", "a_state"]


class State(NamedTuple):
    """What is written."""

    running_mean: Tensor
    running_deconv: Tensor
    gained: list[Tensor]
    counter: Tensor

    def tensors(self) -> list[Tensor]:
        """Return all of it, the counter last."""
        return [self.running_mean, self.running_deconv, *self.gained, self.counter]

    def clone(self) -> "State":
        """Return a copy."""
        return self.to(self.running_mean.dtype)

    def to(self, dtype: torch.dtype) -> "State":
        """Return a copy, in another dtype but for the counter."""
        mean, deconv, *gained = (value.to(dtype, copy=True) for value in self.tensors()[:-1])
        return State(mean, deconv, gained, self.counter.clone())


def a_state(blocks: Blocks, gained: bool, forwards: int = 2) -> State:
    """Return running values, which fit no batch, after so many forwards."""
    sets, features = blocks.sets, blocks.features
    deconv = torch.randn(sets, features, features)
    extra = [torch.rand(sets) + 0.5, torch.rand(2, sets) + 0.5] if gained else []
    return State(torch.randn(sets * features), deconv if sets > 1 else deconv[0], extra, torch.tensor(forwards))


def a_batch(shape: tuple[int, ...], seen: Window, blocks: Blocks) -> list[Any]:
    """Return the arguments between state and averaging; the second of several sets does not vary."""
    sets, features = blocks.sets, blocks.features
    mean, varies = torch.randn(sets, features), torch.ones(sets, dtype=torch.bool)
    varies[1:2] = False
    whitener = torch.randn(sets, features, features)
    return [torch.randn(shape), mean, 0.9 * mean, whitener, varies, 70, seen, blocks]
