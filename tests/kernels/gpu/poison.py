"""Memory that shows where nothing was written to it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["poisoned_memory"]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let memory that torch allocates hold NaN, or the greatest number of an integer type, until it is written to."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # what deterministic algorithms do beside
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
