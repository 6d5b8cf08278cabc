"""Interleaved timing: what is compared takes turns within one run, so that a busy machine slows all of it alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Spread", "Timings", "interleave", "synchroniser"]

Action = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a number of measurements."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute them; quartiles interpolate between measurements, a single one is all three."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Timings:
    """Seconds of each label, one measurement a round: the i-th ones of all labels belong together."""

    seconds: Mapping[str, Sequence[float]]

    def spread(self, label: str) -> Spread:
        """Return median and quartiles of a label's seconds."""
        return Spread.of(self.seconds[label])

    def ratio(self, label: str, reference: str) -> Spread:
        """Return median and quartiles of seconds over the reference's seconds, round by round."""
        pairs = zip(self.seconds[label], self.seconds[reference], strict=True)
        return Spread.of([ours / theirs for ours, theirs in pairs])

    def fastest(self, labels: Sequence[str]) -> str:
        """Return the label with the smallest median."""
        return min(labels, key=lambda label: self.spread(label).median)


def interleave(
    actions: Mapping[str, Action],
    *,
    rounds: int = 7,
    warmup: int = 2,
    synchronise: Action = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], object] = lambda message: None,
) -> Timings:
    """Time every action once a round, in an order that is shuffled anew each round (the same in every run).

    Args:
        actions: what to time, by label.
        rounds: measurements of each action.
        warmup: rounds before the first that counts; compilation and allocation belong there.
        synchronise: waits for the device; called before each look at the clock.
        clock: seconds.
        progress: is told of each round.

    Raises:
        ValueError: no action, rounds < 1 or warmup < 0.
    """
    if not actions or rounds < 1 or warmup < 0:
        raise ValueError(
            f"{len(actions)} actions, rounds={rounds}, warmup={warmup}: time one or more in one round or more"
        )
    order = random.Random(0)
    seconds: dict[str, list[float]] = {label: [] for label in actions}
    for turn in range(-warmup, rounds):
        progress(f"round {turn + 1} of {rounds}" if turn >= 0 else "warm-up")
        for label in order.sample(list(actions), len(actions)):
            synchronise()
            start = clock()
            actions[label]()
            synchronise()
            if turn >= 0:
                seconds[label].append(clock() - start)
    return Timings(seconds)


def synchroniser(device: str) -> Action:
    """Return a function that waits until the device has done what it was given; a CPU has always done it."""
    kind = torch.device(device).type
    if kind == "cpu":
        return lambda: None
    return lambda: torch.get_device_module(kind).synchronize(device)
