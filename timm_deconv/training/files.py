"""Files and folders that are whole or not there: written under another name, then renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path`, renamed when it is on the disk; on failure `path` stays as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text."""
    write_whole(path, lambda partial: partial.write_text(text))


def flush(path: Path) -> None:
    """Waits until the file, or every file of the folder, is on the disk."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def remove(folder: Path) -> None:
    """Removes a folder where there is one."""
    if folder.exists():
        shutil.rmtree(folder)
