"""Processes that load images: signals that tell a whole job to end leave them, as training still needs their images."""

import atexit
import multiprocessing
import os
import signal
from functools import cache
from types import FrameType

__all__ = ["OutliveSignals", "outlive_signals"]


class OutliveSignals:
    """Called in a worker at its start, lets it outlive SIGTERM and SIGUSR1 until the training process itself ends.

    That one then ends its workers by SIGTERM and waits for them: a worker that ignored it would be waited for for ever.
    """

    def __init__(self) -> None:
        self.ending = multiprocessing.RawValue("b", 0)  # in memory that workers share
        atexit.register(self._end)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, self._on_terminate)
        if hasattr(signal, "SIGUSR1"):  # not so on Windows
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _end(self) -> None:
        self.ending.value = 1

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if self.ending.value:
            os._exit(0)


@cache
def outlive_signals() -> OutliveSignals:
    """Return the one of this process."""
    return OutliveSignals()
