"""Where the recipes and results are: `hub_configs/` of the checkout, or package data in an installed wheel."""

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
