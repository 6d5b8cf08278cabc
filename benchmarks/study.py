"""Accuracy of whitening options and of their peers, over seeds, on one network and recipe; and against step time.

A variant is a text of one word and settings: `twin` (batch norm), `iterative` (iterative normalisation) or a preset's
name, then `key=value` of the recipe, or of the whitening as `deconv.key=value`: `fast deconv.block=16 lr=0.05`.
`live_every=N` lets statistics live in every N-th step alone; the steps between whiten with the running ones, or with
`between=last` with the latest that were live.
"""

import csv
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_deconv.convert.statistics import freeze_statistics
from timm_deconv.data import SEGMENTATION
from timm_deconv.errors import InputError, unknown_name
from timm_deconv.layers import PRESETS, WhiteningMixin
from timm_deconv.timing import interleave
from timm_deconv.training.loop import train
from timm_deconv.training.recipe import Recipe, load_recipe, parse_settings
from timm_deconv.training.tasks import Classification, RecipeTask, create_task
from timm_deconv.training.tasks.base import Batch

from . import plots
from .networks import with_iterative_norm
from .rows import CONDITIONS, Row, add_rows, conditions, print_table, result_files, rounded
from .step import StepSettings, check_training, random_batch, training_step

__all__ = [
    "APART",
    "COLUMNS",
    "PARETO_COLUMNS",
    "SHOWN",
    "Variant",
    "compare_with_steps",
    "final_accuracies",
    "pareto_rows",
    "rate_rows",
    "study_files",
    "study_recipe",
    "train_variants",
    "variant",
]

PEERS = ("twin", "iterative")

SPARSE = ("live_every=", "between=")

COLUMNS = [
    *"network width variant recipe recipe_hash seed data opt lr amp epochs epoch top1 miou train_loss seconds".split(),
    *CONDITIONS,
]

PARETO_COLUMNS = [
    *"network width variant recipe top1 top1_deviation seeds seconds seconds_lower seconds_upper".split(),
    *"ratio_to_first batch rounds".split(),
    *CONDITIONS,
]

APART = "network width data recipe epochs opt amp".split()
"""Columns that tell runs apart which are not to be averaged or joined by a line."""

SHOWN = "variant top1 top1_deviation seeds seconds ratio_to_first".split()


@dataclass(frozen=True)
class Variant:
    """What is trained: the recipe with its network, and what makes a task of it."""

    name: str
    recipe: Recipe
    task: Callable[[Recipe, torch.device], RecipeTask]

    def create_model(self) -> nn.Module:
        """Create a fresh network, in training mode."""
        return self.task(self.recipe, torch.device("cpu")).create_model().train()


def study_recipe(name: str, settings: Sequence[str], *, data_dir: str | None, width: float | None) -> Recipe:
    """Load the recipe that all variants of a study have in common.

    Args:
        name: of hub_configs/recipes, or a YAML file.
        settings: `key=value`, in place of the recipe's.
        data_dir: the recipe's `data_dir`; None leaves it.
        width: multiplies the channels of the network; None leaves it.

    Raises:
        InputError: a name or setting that is not known.
    """
    recipe = load_recipe(name, [*settings, *([f"data_dir={data_dir}"] if data_dir else [])])
    return recipe if width is None else recipe.merged({"model_kwargs": recipe.model_kwargs | {"width": width}})


def study_files(recipe: Recipe, output: Path | None, record: bool) -> list[Path]:
    """List the files that rows go to, see `rows.result_files`; runs from weights have another one than those without.

    Raises:
        InputError: there is no checkout to record in.
    """
    name = "finetune.csv" if recipe.pretrained or recipe.pretrained_path else "study.csv"
    return result_files(output or Path("output", name), record, name)


class IterativeNormalisation(Classification):
    """The recipe's batch-norm network with every batch norm replaced by iterative normalisation."""

    def create_model(self) -> nn.Module:
        return with_iterative_norm(super().create_model())


class SparseStatistics(Classification):
    """The recipe's whitened network, whose statistics are live in the first of every so many training steps.

    In the others layers whiten with statistics that pass on no gradient: the running ones, or the latest live ones.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, live_every: int, between: str) -> None:
        super().__init__(recipe, device)
        self._live_every, self._keeps, self._steps = live_every, between == "last", 0
        self._latest: dict[WhiteningMixin, tuple[Tensor, Tensor]] = {}

    def create_model(self) -> nn.Module:
        model = super().create_model()
        for layer in model.modules() if self._keeps else ():
            if isinstance(layer, WhiteningMixin):
                layer._live_weight = partial(self._live_weight, layer, layer._live_weight)
        return model

    def _live_weight(self, layer: WhiteningMixin, live_weight: Callable[..., Any], *args: Any) -> Any:
        """Do what the layer does, and remember its statistics."""
        live = live_weight(*args)
        self._latest[layer] = live.mean, live.whitener
        return live

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        frozen = self._steps % self._live_every > 0
        freeze_statistics(model, frozen=frozen)
        self._steps += 1
        if not frozen:
            return super().loss(model, batch)
        running = {layer: _exchanged(layer, *latest) for layer, latest in self._latest.items()}
        try:
            return super().loss(model, batch)
        finally:
            for layer, values in running.items():
                _exchanged(layer, *values)


def _exchanged(layer: WhiteningMixin, mean: Tensor, whitener: Tensor) -> tuple[Tensor, Tensor]:
    """Give a layer other running values, and return those that it had."""
    before = layer.running_mean.clone(), layer.running_deconv.clone()
    layer.running_mean.copy_(mean.detach().reshape(layer.running_mean.shape))
    layer.running_deconv.copy_(whitener.detach().reshape(layer.running_deconv.shape))
    return before


def variant(text: str, network: str, recipe: Recipe) -> Variant:
    """Read a text as a variant of a registered pair of networks and a recipe, whose model is filled in.

    Raises:
        InputError: an unknown first word, network or setting.
    """
    first, *settings = text.split() or [""]
    if first not in (*PEERS, *PRESETS):
        raise unknown_name("variant", first, (*PEERS, *PRESETS))
    if not timm.is_model(f"{network}_deconv"):
        pairs = [name.removesuffix("_deconv") for name in timm.list_models("*_deconv")]
        raise unknown_name("pair of networks", network, pairs)
    arguments: dict[str, Any] = dict(recipe.model_kwargs)
    arguments.pop("deconv", None)
    if first in PRESETS:
        arguments["deconv"] = {"preset": first}
    sparse = dict(setting.split("=", 1) for setting in settings if setting.startswith(SPARSE))
    settings = [setting for setting in settings if not setting.startswith(SPARSE)]
    long = [f"model_kwargs.{setting}" if setting.startswith("deconv.") else setting for setting in settings]
    model = {"model": network if first in PEERS else f"{network}_deconv", "model_kwargs": arguments}
    model |= {"calibration_images": 0} if first in PEERS else {}
    changed = recipe.merged(parse_settings(long, recipe.model_dump() | model))
    if first == "iterative" and (changed.dataset in SEGMENTATION or changed.freeze_bn or changed.freeze_backbone):
        raise InputError(f"{text!r}: iterative normalisation is compared in classification, with nothing frozen")
    if sparse:
        return Variant(text, changed, _sparse_task(text, sparse, changed))
    return Variant(text, changed, IterativeNormalisation if first == "iterative" else create_task)


def _sparse_task(text: str, sparse: Mapping[str, str], recipe: Recipe) -> Callable[..., RecipeTask]:
    """Return what makes a task of statistics that live in some steps alone."""
    number, between = sparse.get("live_every", ""), sparse.get("between", "average")
    if not number.isdecimal() or int(number) < 1:
        raise InputError(f"{text!r}: live_every={number} must be a whole number of steps, 1 or more")
    if between not in ("average", "last"):
        raise unknown_name("kind of statistics", between, ("average", "last"))
    if not recipe.model.endswith("_deconv") or recipe.dataset in SEGMENTATION:
        raise InputError(f"{text!r}: live_every= is for whitened networks that classify")
    return partial(SparseStatistics, live_every=int(number), between=between)


def train_variants(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    files: Sequence[Path],
    progress: Callable[[str], object] = print,
) -> None:
    """Train every variant with every seed and add a row for each epoch to CSV files, as soon as a run has ended.

    Args:
        variants: of one network and recipe.
        seeds: of weights, order and augmentation.
        folder: of the runs; what is there of an interrupted one is continued.
        files: of `COLUMNS`; runs that have rows in all of them are not done again.
        progress: is told of each run.
    """
    for seed in seeds:
        for each in variants:
            recipe = each.recipe.merged({"seed": seed})
            missing = [file for file in files if not _is_done(file, each.name, recipe)]
            if not missing:
                continue
            progress(f"{recipe.model} {recipe.model_kwargs}: {each.name}, seed {seed}")
            place = folder / f"{_slug(each.name)}-{recipe.model}-{_slug(data_name(recipe))}-{recipe.hash()}-seed{seed}"
            train(recipe, place, resume=True, task=each.task)
            rows = list(_epoch_rows(each.name, recipe, place / "curve.csv"))
            add_rows(missing, COLUMNS, rows)


def final_accuracies(file: Path, variants: Sequence[Variant]) -> dict[str, list[float]]:
    """Read the accuracies of the last epoch from the rows of `train_variants`: of each variant, those of all seeds."""
    found: dict[str, list[float]] = {each.name: [] for each in variants}
    for row in _read(file):
        for each in variants:
            if _is_of(row, each.name, each.recipe) and int(row["epoch"]) == each.recipe.epochs:
                found[each.name].append(float(row["top1"] or row["miou"]))
    return found


def rate_rows(file: Path) -> list[Row]:
    """Average over seeds what the variants in a file reached at each rate after the last epoch, with the deviation.

    A variant's own `lr=` is taken out of its text. Other widths, recipes, lengths of training, optimisers and
    precisions stand apart; settings given for all variants of a study do not: keep such studies in files of their own.
    """
    found: dict[tuple[str, ...], list[float]] = {}
    for row in _read(file):
        if row["epoch"] == row["epochs"]:
            name = " ".join(word for word in row["variant"].split() if not word.startswith("lr="))
            figure = "miou" if row["miou"] else "top1"
            key = (*(row[column] for column in APART), name, figure, row["lr"])
            found.setdefault(key, []).append(float(row[figure]))
    names = [*APART, "variant", "figure"]
    return [
        dict(zip(names, key[:-1], strict=True))
        | {"lr": float(key[-1]), "value": rounded(statistics.mean(values)), "seeds": len(values)}
        | {"deviation": rounded(statistics.stdev(values)) if len(values) > 1 else ""}
        for key, values in found.items()
    ]


def compare_with_steps(
    files: Sequence[Path], variants: Sequence[Variant], picture: Path, *, batch: int, rounds: int
) -> None:
    """Print and draw accuracies against seconds of a training step, and add the rows to study_pareto.csv.

    Args:
        files: of `train_variants`; the last one is read, and new rows go beside each of them.
        variants: what is compared, see `pareto_rows`.
        picture: file that is drawn.
        batch: images a step.
        rounds: measurements of each step.

    Raises:
        InputError: the file has rows of none, or there is no matplotlib.
    """
    plots.need_matplotlib()
    measured = pareto_rows(files[-1], variants, StepSettings(batch=batch, rounds=rounds))
    add_rows([file.with_name("study_pareto.csv") for file in files], PARETO_COLUMNS, measured)
    print_table(measured, SHOWN)
    plots.pareto_picture(measured, picture)


def pareto_rows(
    file: Path, variants: Sequence[Variant], settings: StepSettings, progress: Callable[[str], object] = print
) -> list[Row]:
    """Time a training step of every variant that `file` has rows of, interleaved, beside their accuracies.

    Args:
        file: of `train_variants`.
        variants: of one network and recipe; the first is what times are compared with, usually `twin`.
        settings: batch and rounds of the steps.
        progress: is told of each round.

    Raises:
        InputError: `file` has rows of none.
    """
    accuracies = {name: values for name, values in final_accuracies(file, variants).items() if values}
    timed = [each for each in variants if each.name in accuracies]
    if not timed:
        raise InputError(f"{file} has no rows of these variants; train them first, without --picture")
    steps = {each.name: _step(each, settings) for each in timed}
    timings = interleave(steps, rounds=settings.rounds, warmup=settings.warmup, progress=progress)
    rows = []
    for each in timed:
        spread, values = timings.spread(each.name), accuracies[each.name]
        rows.append(
            {
                "network": each.recipe.model.removesuffix("_deconv"),
                "width": each.recipe.model_kwargs.get("width", 1.0),
                "variant": each.name,
                "recipe": each.recipe.name,
                "top1": rounded(statistics.mean(values)),
                "top1_deviation": rounded(statistics.stdev(values)) if len(values) > 1 else "",
                "seeds": len(values),
                "seconds": rounded(spread.median),
                "seconds_lower": rounded(spread.lower),
                "seconds_upper": rounded(spread.upper),
                "ratio_to_first": rounded(timings.ratio(each.name, timed[0].name).median),
                "batch": settings.batch,
                "rounds": settings.rounds,
                **conditions(settings.device),
            }
        )
    return rows


def _step(each: Variant, settings: StepSettings) -> Callable[[], object]:
    model = each.create_model()
    step = training_step(model, *random_batch(settings, model, "channels_last"), settings)
    check_training(each.name, model, step())
    return step


def _epoch_rows(name: str, recipe: Recipe, curve: Path) -> Iterator[Row]:
    common = _identity(name, recipe) | {
        "data": data_name(recipe),
        "opt": recipe.opt,
        "lr": recipe.lr,
        "amp": recipe.amp_dtype if recipe.amp else "",
        **conditions("cuda" if torch.cuda.is_available() else "cpu"),  # where `train` runs
    }
    for row in csv.DictReader(curve.read_text().splitlines()):
        yield common | {column: row.get(column, "") for column in ("epoch", "top1", "miou", "train_loss", "seconds")}


def data_name(recipe: Recipe) -> str:
    """Return the data folder's name, by which rows tell variants of a data set apart."""
    return Path(recipe.data_dir).resolve().name if recipe.data_dir else ""


def _identity(name: str, recipe: Recipe) -> Row:
    """Return the columns that tell the rows of two runs apart."""
    return {
        "network": recipe.model.removesuffix("_deconv"),
        "width": recipe.model_kwargs.get("width", 1.0),
        "variant": name,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash(),
        "epochs": recipe.epochs,
        "seed": recipe.seed,
    }


def _is_of(row: dict[str, str], name: str, recipe: Recipe) -> bool:
    wanted = {key: str(value) for key, value in _identity(name, recipe).items() if key != "seed"}
    return all(row[key] == value for key, value in wanted.items())


def _is_done(file: Path, name: str, recipe: Recipe) -> bool:
    return any(_is_of(row, name, recipe) and int(row["seed"]) == recipe.seed for row in _read(file))


def _read(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name)
