"""Order and augmentation of an epoch: functions of seed, epoch and index alone.

They depend neither on workers nor on processes nor on how far a loader had come, so a run goes on in the middle of an
epoch, with other workers and processes too.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["EpochSampler", "Seeded", "kept_random_states", "permutation", "seed_everything"]

Key = tuple[int, int]
"""Epoch and index of an image."""


class EpochSampler(Sampler[list[Key]]):
    """Batches of an epoch's images in random order, of which every process takes its share.

    A batch of B images over P processes is B / P images of each, process 0 first: whatever their number, the joined
    batches are the same. Images that do not fill a batch are left out.

    Args:
        length: images of the data set.
        batch_size: images a batch, over all processes.
        seed: of the order.

    Attributes:
        epoch, consumed: where iteration begins: the epoch, and how many of its images all processes have had together.
        process, processes: whose share this is, and of how many; `batch_size` divides into them.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = self.consumed = self.process = 0
        self.processes = 1

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        order, share = permutation(self.length, self.seed, self.epoch), self.batch_size // self.processes
        for batch in range(self.consumed // self.batch_size, len(self)):
            first = batch * self.batch_size + self.process * share
            yield [(self.epoch, index) for index in order[first : first + share].tolist()]


def permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order (length,) of an epoch's images, a function of the arguments alone."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    return torch.randperm(length, generator=generator)


class Seeded(Dataset):
    """A data set whose transforms draw the same numbers for an image of an epoch wherever they run.

    Args:
        dataset: of any items by index; its transforms may draw from Python's, numpy's and torch's generators.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        """Return a batch's items; the generators of the process are left as they were."""
        with kept_random_states():
            return [self._item(*key) for key in keys]

    def _item(self, epoch: int, index: int) -> Any:
        seed_everything(self.seed, epoch, index)
        return self.dataset[index]


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Restore the states of Python's, numpy's and torch's generators of the processor afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_everything(seed: int, *place: int) -> None:
    """Seed Python's, numpy's and torch's generators of the processor by a run's seed and a place in it."""
    seeds = np.random.SeedSequence(seed, spawn_key=place).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would seed the GPUs too
