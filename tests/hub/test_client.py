"""The real client of the Hub, of the lowest version that we support and of the newest, drives a local Hub."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

ROOT = Path(__file__).parents[2]
LOWEST = "0.26.0"


@pytest.mark.parametrize("version", [LOWEST, "installed"])
def test_publishing_and_loading_hold_with_the_client(version: str, client: Callable, finished_run: Path) -> None:
    paths = [place for place in (client(version), str(ROOT)) if place]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TIMM_DECONV_RUN": str(finished_run),
        "TIMM_DECONV_CLIENT": huggingface_hub.__version__ if version == "installed" else version,
    }
    environment.pop("HF_TOKEN", None)
    lenient = ("-o", "filterwarnings=default")  # the client's warnings are not ours
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *lenient, "tests/hub/with_client.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 24


def test_the_lowest_version_is_the_one_that_the_package_asks_for() -> None:
    assert f'"huggingface-hub>={LOWEST.removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()
