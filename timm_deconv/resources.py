"""Where the recipes and results are: `hub_configs/` of the checkout, or package data in an installed wheel.

And which version of the code this is.
"""

import subprocess
from functools import cache
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
    folder = (checkout_configs() or files("timm_deconv") / "hub_configs") / "recipes"
    if not folder.is_dir():
        raise FileNotFoundError(f"no recipes beside or in {files('timm_deconv')}; install the package again")
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}


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
    import timm_deconv

    return f"timm_deconv {timm_deconv.__version__}"
