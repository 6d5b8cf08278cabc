"""python -m timm_deconv SCRIPT.py: a script that knows nothing of the package finds its networks."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "other_project" / "script.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "timm_deconv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_a_script_sees_our_networks_and_its_own_arguments_and_neighbours() -> None:
    done = run(str(SCRIPT), "--model", "resnet18_cifar_deconv", "--width", "0.25")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(SCRIPT), "__main__", "CifarResNet", "7", "neighbour"]


@pytest.mark.parametrize(("arguments", "status", "line"), [((), 1, "usage:"), (("no.py",), 1, "no script 'no.py'")])
def test_without_a_script_the_usage_is_shown(arguments: tuple[str, ...], status: int, line: str) -> None:
    done = run(*arguments)
    assert done.returncode == status and done.stderr.startswith(line) and "Traceback" not in done.stderr


def test_help_is_no_error() -> None:
    done = run("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m timm_deconv SCRIPT.py")


def test_the_scripts_own_failure_is_its_own() -> None:
    done = run(str(SCRIPT), "--model", "no_such_network")
    assert done.returncode == 1 and "Unknown model (no_such_network)" in done.stderr
