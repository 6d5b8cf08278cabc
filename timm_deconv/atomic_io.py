"""Files and folders that are whole or not there: written under another name, then renamed. Locks of shared files."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FAR = 2**30
"""A byte behind the end of any file: where Windows locks, which would otherwise keep others from reading."""


def write_whole(path: Path, write: Callable[[Path], object], partial: Path | None = None) -> None:
    """Let `write` make a file or folder beside `path`, renamed when it is on the disk.

    On failure `path` stays as it was. A folder needs a `path` where there is none, or an empty one.

    Args:
        path: of what is made.
        write: makes it at the path that it is given, where there is nothing.
        partial: that path, beside `path`, .NAME.partial by default; what an earlier process left there is removed.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        remove(partial)
        write(partial)
        flush(partial)
        if partial.is_dir() and path.is_dir():
            path.rmdir()  # which Windows does not do itself
        os.replace(partial, path)
        flush_folder(path.parent)
    except BaseException:
        remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_whole` does."""
    write_whole(path, lambda partial: partial.write_text(text))


def flush(path: Path) -> None:
    """Wait until the file, or all that is in the folder, is on the disk."""
    for file in (*path.rglob("*"), path):
        if file.is_file():
            _sync(file, os.O_RDONLY if fcntl else os.O_RDWR)
        else:
            flush_folder(file)


def flush_folder(folder: Path) -> None:
    """Wait until the names in the folder are on the disk; Windows does so itself."""
    if fcntl:
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder or file where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(file: io.FileIO) -> None:
    """Wait until no other process has locked the file; the lock ends when the file is closed."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX)
        return
    import msvcrt

    file.seek(FAR)
    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
