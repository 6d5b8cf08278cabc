"""Processes for tests of training: `Popen` has the face of `subprocess.Popen`, but forks from a process that has all
imports behind it. A start takes less than a second instead of six.

Forks lack what a process of its own has: other orders of sets of strings, and the imports themselves.
"""

import ctypes
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, TimeoutExpired

__all__ = ["PIPE", "Popen"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["timm_deconv.training.loop", "sklearn.datasets", "torch.utils.tensorboard"])


class Popen:
    """A Python program, as `python FILE` or `python -m MODULE` with arguments; what it prints goes to files.

    Args:
        command: whose first word, the interpreter, is not looked at.
        env: all variables.
        **pipes: what `subprocess.Popen` is told; there are always those for text.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str], **pipes: object) -> None:
        folder = Path(tempfile.mkdtemp())
        self._files = [folder / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        self._said: list[str] = []
        self._process = FORKS.Process(target=_become, args=(command[1:], env, self._files))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for signals; None before the end."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit status."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that has not ended."""
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, for so many seconds; return what was printed."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired("", timeout or 0)
        if not self._said:
            self._said = [file.read_text() for file in self._files]
            shutil.rmtree(self._files[0].parent)
        out, err = self._said
        return out, err


def _become(arguments: list[str], environment: dict[str, str], files: list[Path]) -> None:
    """Run a program, and end as Python does: what `multiprocessing` leaves out at an interpreter's end may hang too."""
    gc.freeze()  # what was imported is not looked through at the end
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in enumerate([os.devnull, *files]):
        os.dup2(os.open(name, os.O_RDWR), descriptor)
    status: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
    if not isinstance(status, int):
        print(status, file=sys.stderr)
    ctypes.pythonapi.Py_Exit(status if isinstance(status, int) else 1)
