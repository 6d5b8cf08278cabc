"""Versions of the Hub's client beside the installed one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def client(pytestconfig: pytest.Config) -> Callable[[str], str]:
    """Give the folder of a version of huggingface_hub, installed beside the others and kept between runs."""

    def place(version: str) -> str:
        if version == "installed":
            return ""
        folder = pytestconfig.cache.mkdir(f"huggingface_hub-{version}")
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "complete").exists():
                _install(version, folder)
        return str(folder)

    return place


def _install(version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--upgrade"]
    command += [f"huggingface_hub=={version}"]
    free = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}  # which names the newest
    done = subprocess.run(command, env=free, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip(f"no huggingface_hub {version} to be had: {done.stderr.strip().splitlines()[-1]}")
    (folder / "complete").touch()
