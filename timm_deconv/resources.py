"""Where recipes, results and weights are: `hub_configs/` of the checkout, or package data in an installed wheel.

And which version of the code this is.
"""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def checkout_configs() -> Path | None:
    """Find `hub_configs/` of the source checkout this package is imported from; None in an installed wheel."""
    folder = Path(__file__).resolve().parent.parent / "hub_configs"
    return folder if folder.is_dir() else None


def recipe_files() -> dict[str, Traversable]:
    """List the recipes that come with the package: name and YAML file.

    Raises:
        FileNotFoundError: neither a checkout nor a wheel that carries them.
    """
    folder = _configs() / "recipes"
    if not folder.is_dir():
        raise FileNotFoundError(f"no recipes beside or in {files('timm_deconv')}; install the package again")
    return _yaml_files(folder)


def entry_files() -> dict[str, Traversable]:
    """List the entries of the zoo that come with the package: ARCHITECTURE.TAG and YAML file."""
    return _yaml_files(_configs()) if _configs().is_dir() else {}


def weights_file(folder: str, name: str) -> Path | None:
    """Find a file of weights in `packaged/` or, in a checkout, `weights/` of `hub_configs/`; None where it is not."""
    path = _configs() / folder / name
    return path if isinstance(path, Path) and path.is_file() else None


def _configs() -> Traversable:
    return checkout_configs() or files("timm_deconv") / "hub_configs"


def _yaml_files(folder: Traversable) -> dict[str, Traversable]:
    found = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in found if file.name.endswith(".yaml")}


@cache
def code_version() -> str:
    """Return the commit of the checkout, `-dirty` behind it where files differ; of an installed wheel the version."""
    configs = checkout_configs()
    if configs is not None:
        command = ["git", "-C", str(configs.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass  # no git, or a copy without its history
    try:
        return f"timm_deconv {version('timm-deconv')}"
    except PackageNotFoundError:
        return "unknown"
