"""The least of kernels, which shows whether Triton works."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

__all__ = ["add_one"]


def add_one(number: Tensor) -> None:
    """Add one to a number (), in place."""
    Launch(_add_one, (1,))(number)


@triton.jit
def _add_one(number):  # the compiler reads annotations as code
    tl.store(number, tl.load(number) + 1)
