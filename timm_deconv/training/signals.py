"""Signals that end a run at its next update: what schedulers of jobs send before they kill."""

import signal
from types import FrameType
from typing import Any

__all__ = ["Signals"]

NAMES = ("SIGTERM", "SIGUSR1")
"""Slurm's before it kills, and what its `--signal` is mostly set to. Windows has only the first."""


class Signals:
    """A context that takes note of a signal, which would have ended the process.

    Attributes:
        received: its name; None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        for name in NAMES:
            if number := getattr(signal, name, None):
                try:
                    self.before[number] = signal.signal(number, self._note)
                except ValueError:  # only the main thread may
                    break
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
