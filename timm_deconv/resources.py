"""Where the recipes and results are: `hub_configs/` of the checkout, or package data in an installed wheel."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def checkout_configs() -> Path | None:
    """`hub_configs/` of the source checkout this package is imported from; None in an installed wheel."""
    folder = Path(__file__).resolve().parent.parent / "hub_configs"
    return folder if folder.is_dir() else None


def hub_configs() -> Traversable:
    """The folder of recipes, results and model configurations, wherever the package came from.

    Raises:
        FileNotFoundError: neither a checkout nor a wheel that carries it.
    """
    packaged = files("timm_deconv") / "hub_configs"
    folder = checkout_configs() or packaged
    if not folder.is_dir():
        raise FileNotFoundError(f"no hub_configs beside or in {files('timm_deconv')}; install the package again")
    return folder


def recipe_files() -> dict[str, Traversable]:
    """The recipes that come with the package: name -> YAML file."""
    folder = hub_configs() / "recipes"
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
