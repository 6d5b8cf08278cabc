"""A finished run of a small network, and versions of the Hub's client beside the installed one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run; not to be written to."""
    from timm_deconv.training import load_recipe  # here: `with_client.py` says first which Hub the client asks
    from timm_deconv.training.loop import train

    folder = tmp_path_factory.mktemp("run") / "digits"
    small = ["train_images=256", "val_images=64", "batch_size=64", "epochs=2", "health_interval=0"]
    recipe = load_recipe("digits", ["model=test_resnet", "model_kwargs={}", *small])
    model = {"model": "resnet18_cifar_deconv", "model_kwargs": {"width": 0.0625}}
    train(recipe.merged(model), folder, cpu=True)
    return folder


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
    done = subprocess.run(
        [*command, f"huggingface_hub=={version}"], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        pytest.skip(f"no huggingface_hub {version} to be had: {done.stderr.strip().splitlines()[-1]}")
    (folder / "complete").touch()
