"""New entries of the zoo, from finished runs: the YAML file, weights folded and in float16, and the run's row."""

import csv
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from timm_deconv.convert import fuse
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.data import SEGMENTATION, class_labels, class_names, create_dataset
from timm_deconv.errors import InputError, needs_extra
from timm_deconv.models import list_models
from timm_deconv.models.weights import TAG_PREFIX, write_weights
from timm_deconv.models.zoo import RunResult, WeightsFile, ZooEntry
from timm_deconv.resources import checkout_configs, recipe_files

with needs_extra("train"):
    from timm_deconv.atomic_io import write_text, write_whole
    from timm_deconv.training.recipe import NOT_IN_HASH, Recipe, load_recipe
    from timm_deconv.training.results import append_rows, dataset_name

__all__ = ["LICENSES", "PAPER", "TRAINED", "add_entry", "dataset_word"]

TRAINED = "nd_"
"""Starts the tags of weights that were trained with deconvolution."""

MEGABYTE = 1_000_000
LIMITS = {"packaged": 2 * MEGABYTE, "weights": 10 * MEGABYTE}
PACKAGED_SEGMENTATION = 3 * MEGABYTE

PAPER = "arXiv:1905.11926"
LICENSES = {
    "cifar10": "CIFAR-10 (Krizhevsky, 2009) states no licence: for research only",
    "cifar100": "CIFAR-100 (Krizhevsky, 2009) states no licence: for research only",
    "camvid": "CamVid (Brostow et al., 2009) is for research only",
    "cityscapes": "Cityscapes is for non-commercial research, by its terms of use",
    "imagenet": "ImageNet is for non-commercial research, by its terms of access",
    "fashion_mnist": "Fashion-MNIST: MIT licence",
    "mnist": "MNIST: CC BY-SA 3.0",
    "digits": "Optical recognition of handwritten digits (UCI): CC BY 4.0",
}
"""What may be done with the images, and so with weights made of them, by the word of a run's row."""

DECIDED = ("input_size", "pool_size", "mean", "std", "crop_pct", "interpolation")
DECIDED += ("num_classes", "first_conv", "classifier")
"""Fields of timm's configuration that a run decides, or the network that a general name stands for."""
FIGURES = ("top1", "miou")
IDENTIFYING = ("model", "model_kwargs", "recipe", "recipe_hash", "seed", "dataset", "data", "epochs", "date")
"""Columns of a row that tell it from others."""
ROUNDING = 2**-11
"""Of float16, relative."""
LAYERS = 32
"""How many roundings may add up in an output."""


def add_entry(run: str | Path, tag: str, *, packaged: bool = False, configs: Path | None = None) -> ZooEntry:
    """Add a finished run to the zoo; nothing is evaluated. Either all of the entry is written, or none of it.

    Args:
        run: its output folder.
        tag: the weights' name: `nd_*` of a deconvolution network that was trained, without a prefix of a batch-norm
            network.
        packaged: put the weights where the wheel takes them from, else where a checkout alone has them.
        configs: `hub_configs/` to write into; the checkout's by default.

    Raises:
        InputError: an unfinished run, weights that do not load or do not fit the limit of size, give outputs that are
            not finite, or others in float16 than its rounding explains; an entry that is there already; a data set of
            unknown licence.
    """
    run = Path(run)
    configs = configs or _checkout()
    recipe, row = _finished(run)
    model = timm.create_model(f"local-dir:{run.resolve()}", pretrained=True).eval()
    architecture: str = model.pretrained_cfg["architecture"]
    _check_tag(tag, architecture)
    target = configs / f"{architecture}.{tag}.yaml"
    if target.exists():
        raise InputError(f"{target} is there already: take another tag, or remove the file first")
    dataset = dataset_word(recipe)
    if dataset not in LICENSES:
        raise InputError(f"the licence of {dataset!r} is not known: add it to LICENSES of timm_deconv/hub/entries.py")
    folder = "packaged" if packaged else "weights"
    weights = configs / folder / f"{architecture}.{tag}.safetensors"
    plain = fuse(model) if is_whitened(model) else model
    row = {**row, "dataset": dataset}
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_whole(weights, lambda file: _write_checked(model, plain, file, folder, recipe))
    weights.chmod(0o644)  # safetensors lets its owner alone read it
    try:
        entry = _entry(model, tag, recipe, row, {folder: _described(weights)})
        _record(configs / "results" / f"{dataset}.csv", row)
        text = yaml.safe_dump(entry.to_dict(), sort_keys=False, allow_unicode=True, width=120)
        write_text(target, f"# Made by: python scripts/add_to_zoo.py RUN_DIR --tag {tag}\n{text}")
    except BaseException:
        weights.unlink()
        raise
    return entry


def _checkout() -> Path:
    configs = checkout_configs()
    if configs is None:
        raise InputError("entries are added to a checkout of the project: an installed package has none to add to")
    return configs


def _finished(run: Path) -> tuple[Recipe, dict[str, str]]:
    """Read a run's recipe and the row of its end."""
    for name in ("recipe.yaml", "config.json", "model.safetensors", "results.csv"):
        if not (run / name).is_file():
            raise InputError(f"{run} has no {name}: it is no finished run; resume it, or name another folder")
    with (run / "results.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if len(rows) != 1:
        raise InputError(f"{run / 'results.csv'} has {len(rows)} rows: a finished run has one")
    return load_recipe(str(run / "recipe.yaml")), rows[0]


def _check_tag(tag: str, architecture: str) -> None:
    if architecture in list_models():
        if not tag.startswith(TRAINED):
            raise InputError(f"tag {tag!r}: weights trained with deconvolution have one that starts with {TRAINED}")
    elif tag.startswith((TRAINED, TAG_PREFIX)):
        raise InputError(f"tag {tag!r}: those of a batch-norm network have no prefix, such as e20_cifar10")


def dataset_word(recipe: Recipe) -> str:
    """Name the data set in one word; where the run read folders, as the recipe of its name does."""
    if not recipe.dataset and recipe.name in recipe_files():
        recipe = recipe.merged({"dataset": load_recipe(recipe.name).dataset})
    return dataset_name(recipe)


# The weights


def _write_checked(model: nn.Module, plain: nn.Module, file: Path, folder: str, recipe: Recipe) -> None:
    """Write the plain network in float16, and compare what timm loads from it with the run's network."""
    write_weights(plain, file, half=True)
    limit = PACKAGED_SEGMENTATION if folder == "packaged" and recipe.dataset in SEGMENTATION else LIMITS[folder]
    if (size := file.stat().st_size) > limit:
        way_out = "leave out --packaged" if folder == "packaged" else "publish them on the Hub"
        raise InputError(
            f"the weights have {size / MEGABYTE:.1f} MB in float16, and {folder}/ takes {limit / MEGABYTE:.0f}:"
            f" {way_out}"
        )
    overlay = {"state_dict": load_file(file), "num_classes": model.num_classes}
    arguments: Any = {"pretrained_cfg_overlay": overlay, **model._model_args}
    loaded = timm.create_model(model.pretrained_cfg["architecture"], pretrained=True, **arguments)
    _compare(loaded.eval(), model, recipe)


@torch.no_grad()
def _compare(loaded: nn.Module, model: nn.Module, recipe: Recipe) -> None:
    x = torch.randn(8, *recipe.input_size, generator=torch.Generator().manual_seed(0))
    found, expected = loaded(x), model(x)
    if not (_finite(found) and _finite(expected)):
        raise InputError("the network's outputs are not finite: train it again, at a smaller learning rate")
    largest = expected.abs().max()
    if (difference := (found - expected).abs().max()) > LAYERS * ROUNDING * largest:
        raise InputError(
            f"in float16 the outputs differ by {difference / largest:.1%} of the largest, more than its rounding:"
            " publish the weights in float32"
        )


def _finite(output: Tensor) -> bool:
    return bool(output.isfinite().all())


def _described(file: Path) -> WeightsFile:
    return WeightsFile(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size=file.stat().st_size)


# What is said of them


def _entry(
    model: nn.Module, tag: str, recipe: Recipe, row: Mapping[str, str], files: Mapping[str, WeightsFile]
) -> ZooEntry:
    cfg: Any = model.pretrained_cfg
    figures = [key for name in FIGURES for key in (name, f"best_{name}") if key in row]
    own = cfg.get("paper_ids") or ()
    papers = [own] if isinstance(own, str) else [*own]
    start = recipe.pretrained_path or ("timm's" if recipe.pretrained else None)
    return ZooEntry(
        architecture=cfg["architecture"],
        tag=tag,
        license="apache-2.0",
        origin=f"trained by timm_deconv from {f'{start} weights' if start else 'random weights'}",
        dataset=row["dataset"],
        dataset_license=LICENSES[row["dataset"]],
        recipe=recipe.name,
        settings=_differing(recipe),
        seed=recipe.seed,
        recipe_hash=row["recipe_hash"],
        results=RunResult(
            file=f"{row['dataset']}.csv",
            row={key: row[key] for key in IDENTIFYING},
            figures={**{key: float(row[key]) for key in figures}, "parameters": int(row["parameters"])},
        ),
        model_args=_arguments(model),
        pretrained_cfg={key: _plain(cfg[key]) for key in DECIDED if key in cfg},
        label_names=_labels(recipe),
        paper_ids=tuple(dict.fromkeys([*papers, PAPER] if is_whitened(model) else papers)),
        files=files,
    )


def _differing(recipe: Recipe) -> dict[str, Any]:
    """Return the settings, of those that change what is learned, in which a run differs from the recipe of its name."""
    if recipe.name not in recipe_files():
        return {}
    named = load_recipe(recipe.name).model_dump(mode="json", exclude=NOT_IN_HASH)
    own = recipe.model_dump(mode="json", exclude=NOT_IN_HASH)
    return {key: value for key, value in own.items() if value != named[key]}


def _arguments(model: Any) -> dict[str, Any]:
    """Return the arguments that make the network, without those that timm's configuration says."""
    said = ("num_classes", "in_chans", "global_pool", "fused")
    return {key: value for key, value in model._model_args.items() if key not in said}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _labels(recipe: Recipe) -> tuple[str, ...]:
    """Name the classes in their order, as the run's data set does."""
    if recipe.dataset in SEGMENTATION:
        return tuple(class_labels(recipe.dataset, recipe.num_classes).names)
    names = class_names(create_dataset(recipe.dataset, recipe.data_dir, recipe.val_split))
    return tuple(names) if names and len(names) == recipe.num_classes else ()


def _record(path: Path, row: Mapping[str, str]) -> None:
    """Add the row to the results where it is not there yet."""
    if path.exists():
        with path.open(newline="", encoding="utf-8") as lines:
            if any(all(known.get(key) == row[key] for key in IDENTIFYING) for known in csv.DictReader(lines)):
                return
    append_rows(path, list(row), [row])
