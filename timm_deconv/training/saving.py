"""When a run saves what it goes on from: at every epoch, every so often, and when a signal tells it to end."""

import time
from collections.abc import Callable
from typing import Any

from timm_deconv.errors import Stopped

from .checkpoint import Progress, RunFolder
from .processes import Processes
from .recipe import INTERVAL
from .run_state import RunState
from .signals import Signals
from .state_files import read_state

__all__ = ["Saver"]


class Saver:
    """Saves states of a run into its folder, and reads them back; all processes call its methods.

    Args:
        folder: of the run.
        state: gathers what is saved.
        processes: all of the run.
        signals: tell it to end.
        say: tells the user.
    """

    def __init__(
        self, folder: RunFolder, state: RunState, processes: Processes, signals: Signals, say: Callable[[str], None]
    ) -> None:
        self.folder, self.state, self.processes, self.signals, self.say = folder, state, processes, signals, say
        interval = INTERVAL.fullmatch(folder.recipe.checkpoint_every or "")
        self.updates = int(interval["updates"] or 0) if interval else 0
        self.seconds = 60 * float(interval["minutes"] or 0) if interval else 0.0
        self.saved_at = time.monotonic()

    def is_due(self, update: int) -> bool:
        """Tell whether it is time to save after so many updates: alike in all processes."""
        late = bool(self.seconds) and time.monotonic() - self.saved_at >= self.seconds
        late = self.processes.any(late) if self.seconds else late
        return late or (bool(self.updates) and update % self.updates == 0)

    def is_told_to_end(self) -> bool:
        """Tell whether a signal has come to any of the processes."""
        return self.processes.any(self.signals.received is not None)

    def save(self, progress: Progress, own: dict[str, Any]) -> None:
        """Save a state.

        Args:
            progress: how far the run is.
            own: see `RunState.gather`.

        Raises:
            OSError: see `RunFolder.save_state`, in all processes.
        """
        state = self.state.gather({"progress": vars(progress), **own})
        self.processes.main_does(lambda: self.folder.save_state(state or {}, progress))
        self.saved_at = time.monotonic()

    def try_to_save(self, progress: Progress, own: dict[str, Any]) -> None:
        """Save a state in the middle of an epoch; say so if the disk is full, and try again when it is due again."""
        try:
            self.save(progress, own)
        except OSError as error:
            self.say(f"{error}; training goes on")
            self.saved_at = time.monotonic()

    def stop(self, progress: Progress, own: dict[str, Any]) -> None:
        """Save a state and end.

        Raises:
            Stopped: it is saved.
            OSError: it could not be.
        """
        self.save(progress, own)
        text = f"{self.signals.received or 'a signal'}: {progress.place} is saved; --resume goes on from it"
        self.say(text)
        raise Stopped(text)

    def load(self) -> dict[str, Any] | None:
        """Read the latest whole state; None where there is none.

        Raises:
            InputError: all are damaged, or the folder is not the same to all processes.
        """
        newest = self.processes.main_does(lambda: self.folder.newest_state(self.say))
        return None if newest is None else read_state(newest)

    def rewind(self) -> str:
        """Take weights and optimiser back to the latest state; return its name."""
        state = self.load()
        assert state is not None  # the run has saved its beginning
        self.state.restore_weights(state)
        return Progress(**state["processes"][0]["progress"]).place
