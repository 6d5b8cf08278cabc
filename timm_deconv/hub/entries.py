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
from torch import nn

from timm_deconv.atomic_io import write_text, write_whole
from timm_deconv.convert import fuse
from timm_deconv.data import SEGMENTATION, class_labels, class_names, create_dataset
from timm_deconv.errors import InputError, needs_extra
from timm_deconv.models.weights import TAG_PREFIX, write_weights
from timm_deconv.models.zoo import RunResult, WeightsFile, ZooEntry
from timm_deconv.resources import checkout_configs, recipe_files

with needs_extra("train"):
    from timm_deconv.training.recipe import NOT_IN_HASH, Recipe, load_recipe
    from timm_deconv.training.results import append_rows

    from .measure import check_outputs
    from .origins import LICENSES, PAPER, TRAINED
    from .source import Source, read_source

__all__ = ["add_entry"]

MEGABYTE = 1_000_000
LIMITS = {"packaged": 2 * MEGABYTE, "weights": 10 * MEGABYTE}
PACKAGED_SEGMENTATION = 3 * MEGABYTE

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
            not finite, or others in float16 than its rounding explains; an entry or its weights that are there already;
            weights or a data set of unknown licence.
    """
    configs = configs or _checkout()
    source = read_source(run, tag)
    if source.recipe is None or source.recipe.name not in recipe_files():
        raise InputError(f"{run} is of no recipe of the package: add it to hub_configs/recipes, and train by it")
    _check_tag(tag, source.whitened)
    name = f"{source.architecture}.{tag}"
    folder = "packaged" if packaged else "weights"
    target, weights = configs / f"{name}.yaml", configs / folder / f"{name}.safetensors"
    if there := next((path for path in (target, weights) if path.exists()), None):
        raise InputError(f"{there} is there already: take another tag, or remove the file first")
    if not source.model.pretrained_cfg.get("license"):  # type: ignore[operator, union-attr]
        raise InputError(f"the licence of the weights is not known: add license to {Path(run) / 'config.json'}")
    if source.dataset not in LICENSES:
        raise InputError(
            f"the licence of {source.dataset!r} is not known: add it to LICENSES of timm_deconv/hub/origins.py"
        )
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_whole(weights, lambda file: _write_checked(source, file, folder))
    try:
        weights.chmod(0o644)  # safetensors lets its owner alone read it
        row = {**source.result, "dataset": source.dataset}
        entry = _entry(source, row, {folder: _described(weights)})
        text = yaml.safe_dump(entry.to_dict(), sort_keys=False, allow_unicode=True, width=120)
        write_text(target, f"# Made by: python scripts/add_to_zoo.py RUN_DIR --tag {tag}\n{text}")
        _record(configs / "results" / f"{source.dataset}.csv", row)  # last, as others may add to the file meanwhile
    except BaseException:
        target.unlink(missing_ok=True)
        weights.unlink()
        raise
    return entry


def _checkout() -> Path:
    configs = checkout_configs()
    if configs is None:
        raise InputError("entries are added to a checkout of the project: an installed package has none to add to")
    return configs


def _check_tag(tag: str, whitened: bool) -> None:
    if whitened and not tag.startswith(TRAINED):
        raise InputError(f"tag {tag!r}: weights trained with deconvolution have one that starts with {TRAINED}")
    if not whitened and tag.startswith((TRAINED, TAG_PREFIX)):
        raise InputError(f"tag {tag!r}: those of a batch-norm network have no prefix, such as e20_cifar10")


# The weights


def _write_checked(source: Source, file: Path, folder: str) -> None:
    """Write the plain network in float16, and compare what timm loads from it with the run's network."""
    model: Any = source.model
    plain = fuse(model) if source.whitened else model
    check_outputs(model, plain)
    write_weights(plain, file, source.metadata, half=True)
    assert source.recipe is not None
    dense = folder == "packaged" and source.recipe.dataset in SEGMENTATION
    limit = PACKAGED_SEGMENTATION if dense else LIMITS[folder]
    if (size := file.stat().st_size) > limit:
        way_out = "leave out --packaged" if folder == "packaged" else "publish them on the Hub"
        raise InputError(
            f"the weights have {size / MEGABYTE:.1f} MB in float16, and {folder}/ takes {limit / MEGABYTE:.0f}:"
            f" {way_out}"
        )
    own = {**model.pretrained_cfg, "source": None, "file": None, "state_dict": load_file(file)}
    arguments = {"pretrained_cfg": own, **model._model_args}
    _compare(timm.create_model(source.architecture, pretrained=True, **arguments).eval(), model)


@torch.no_grad()
def _compare(loaded: nn.Module, model: Any) -> None:
    x = torch.randn(8, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    expected = model(x)
    largest, difference = expected.abs().max(), (loaded(x) - expected).abs().max()
    if not difference <= LAYERS * ROUNDING * largest:  # nor if it is NaN
        raise InputError(
            f"in float16 the outputs differ by {difference / largest:.1%} of the largest, more than its rounding:"
            " publish the weights in float32"
        )


def _described(file: Path) -> WeightsFile:
    return WeightsFile(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size=file.stat().st_size)


# What is said of them


def _entry(source: Source, row: Mapping[str, str], files: Mapping[str, WeightsFile]) -> ZooEntry:
    model, recipe = source.model, source.recipe
    assert recipe is not None
    cfg: Any = model.pretrained_cfg
    best = "best_" if source.folder.name == "best" else ""
    figure = next(f"{best}{name}" for name in FIGURES if name in row)
    own = cfg.get("paper_ids") or ()
    papers = [own] if isinstance(own, str) else [*own]
    start = recipe.pretrained_path or ("timm's" if recipe.pretrained else None)
    return ZooEntry(
        architecture=source.architecture,
        tag=source.tag,
        license=cfg["license"],
        origin=f"trained by timm_deconv from {f'{start} weights' if start else 'random weights'}",
        dataset=source.dataset,
        dataset_license=LICENSES[source.dataset],
        recipe=recipe.name,
        settings=_differing(recipe),
        seed=recipe.seed,
        recipe_hash=row["recipe_hash"],
        results=RunResult(
            file=f"{source.dataset}.csv",
            row={key: row[key] for key in IDENTIFYING},
            figures={figure: float(row[figure]), "parameters": int(row["parameters"])},
        ),
        model_args=_arguments(model),
        pretrained_cfg={key: _plain(cfg[key]) for key in DECIDED if key in cfg},
        label_names=_labels(source),
        paper_ids=tuple(dict.fromkeys([*papers, PAPER] if source.whitened else papers)),
        files=files,
    )


def _differing(recipe: Recipe) -> dict[str, Any]:
    """Return the settings, of those that change what is learned, in which a run differs from the recipe of its name."""
    named = load_recipe(recipe.name).model_dump(mode="json", exclude=NOT_IN_HASH)
    own = recipe.model_dump(mode="json", exclude=NOT_IN_HASH)
    return {key: value for key, value in own.items() if value != named[key]}


def _arguments(model: Any) -> dict[str, Any]:
    """Return the arguments that make the network, without those that timm's configuration says."""
    said = ("num_classes", "in_chans", "global_pool", "fused")
    return {key: value for key, value in model._model_args.items() if key not in said}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _labels(source: Source) -> tuple[str, ...]:
    """Name the classes in their order, as the configuration of the run does, or its data set where it is silent."""
    cfg: Any = source.model.pretrained_cfg
    recipe = load_recipe(str(source.folder / "recipe.yaml"))  # with the folder of data
    names = cfg.get("label_names")
    if names is None and recipe.dataset in SEGMENTATION:
        names = class_labels(recipe.dataset, recipe.num_classes).names
    elif names is None:
        names = class_names(create_dataset(recipe.dataset, recipe.data_dir, recipe.val_split))
    if names is None or len(names) != source.model.num_classes:
        raise InputError(f"nothing names the {source.model.num_classes} classes: add label_names to config.json")
    return tuple(map(str, names))


def _record(path: Path, row: Mapping[str, str]) -> None:
    """Add the row to the results where it is not there yet."""
    if path.exists():
        with path.open(newline="", encoding="utf-8") as lines:
            if any(all(known.get(key) == row[key] for key in IDENTIFYING) for known in csv.DictReader(lines)):
                return
    append_rows(path, list(row), [row])
