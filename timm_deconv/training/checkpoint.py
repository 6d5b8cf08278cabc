"""The output folder of a run: weights that timm loads, the states to resume from, the recipe, the curve.

model.safetensors, config.json      `timm.create_model('local-dir:OUT', pretrained=True)`
state/epoch-0003-image-00012800/    the state after three epochs and 12,800 images of the fourth; see `state_files`
best/                               the weights of the best epoch so far, as above
recipe.yaml  curve.csv  results.csv  tensorboard/
"""

import csv
import io
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_deconv.atomic_io import remove, write_text, write_whole
from timm_deconv.errors import InputError
from timm_deconv.models.weights import write_weights
from timm_deconv.resources import code_version

from .recipe import Recipe, load_recipe
from .state_files import damage, write_state

# may differ between a run and its continuation
FREE = {
    *("name", "data_dir", "pretrained_path", "dataset_download", "workers", "log_interval"),
    *("max_unreadable", "checkpoint_every", "nonfinite", "nonfinite_limit", "process_timeout", "log_with"),
    *("health_interval", "grad_checkpointing", "torchcompile", "torchcompile_mode", "torchcompile_regions"),
}

KEPT = 2
"""States that stay: should the latest be damaged, there is the one before."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: finished epochs.
        consumed: images of the next epoch that all processes together have had.
        step: updates made or left out.
        left_out: updates left out for a non-finite loss.
        seconds, training_seconds: spent in all, and in training alone.
        curve: a row for each finished epoch.
    """

    epoch: int = 0
    consumed: int = 0
    step: int = 0
    left_out: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Name the place in the run."""
        return f"epoch-{self.epoch:04d}-image-{self.consumed:08d}"


class RunFolder:
    """The output folder of one run. Where there are several processes, the main one alone writes.

    Args:
        path: created by `open` where it is missing.
        recipe: the run's.
    """

    def __init__(self, path: str | Path, recipe: Recipe):
        self.path = Path(path)
        self.recipe = recipe

    def check(self, resume: bool) -> None:
        """Check that the run may write here. A run that ended before it saved anything may begin with other settings.

        Raises:
            InputError: the folder holds another recipe's run, weights of unknown origin, this run and `resume` is not
                set, or this run without a state to resume from.
        """
        saved = self.path / "recipe.yaml"
        begun = any((self.path / "state").glob("epoch-*"))
        if not saved.exists():
            self._refuse_foreign_files()
        elif begun or (self.path / "model.safetensors").exists():
            if differing := _differences(load_recipe(str(saved)), self.recipe):
                raise InputError(
                    f"{self.path} holds a run of other settings ({differing}); choose another --output-dir"
                )
            if not resume:
                raise InputError(f"{self.path} holds this run already; add --resume, or choose another --output-dir")
            if not self.states():
                raise InputError(
                    f"{self.path} holds this run, but no state of this version to resume from; choose another"
                    " --output-dir"
                )

    def open(self, size: int) -> None:
        """Create the folder, with the recipe in it.

        Args:
            size: bytes of a state at least.

        Raises:
            InputError: there is no room for a state.
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.path).free) < size:
            raise InputError(
                f"{self.path}: {free / 1e6:.0f} MB are free, and a state of the run takes {size / 1e6:.0f}; make room,"
                " or choose another --output-dir"
            )
        write_text(self.path / "recipe.yaml", self.recipe.yaml())

    def states(self) -> list[Path]:
        """List the states, the latest last."""
        found = (self.path / "state").glob("epoch-*-image-*[0-9]")
        return sorted(found, key=lambda state: [int(number) for number in re.findall(r"\d+", state.name)])

    def newest_state(self, say: Callable[[str], None]) -> Path | None:
        """Find the latest state that is whole; None where nothing was saved yet.

        Damaged ones are put aside as NAME.damaged.

        Args:
            say: is told of each damaged one.

        Raises:
            InputError: all are damaged.
        """
        found = self.states()
        damaged = {}
        for state in reversed(found):
            reason = damage(state)
            if reason is None:
                for spoilt in damaged:
                    aside = spoilt.with_name(f"{spoilt.name}.damaged")
                    remove(aside)
                    spoilt.rename(aside)
                return state
            damaged[state] = reason
            say(f"{state.name} is damaged ({reason}); trying the one before")
        if damaged:
            raise InputError(f"no state in {self.path / 'state'} is whole; choose another --output-dir to begin anew")
        return None

    def save_state(self, state: dict[str, Any], progress: Progress) -> None:
        """Save a state for `--resume`, and remove all but the last ones.

        Raises:
            OSError: it could not be written, e.g. on a full disk. What was saved before is whole.
        """
        path = self.path / "state" / progress.place
        with self._saying_what_is_left(progress):
            if not path.exists():
                write_state(path, state)
        for older in self.states()[:-KEPT]:
            remove(older)

    def export(self, model: nn.Module, progress: Progress, is_best: bool = False) -> None:
        """Save weights and curve of a finished epoch.

        Args:
            model: the network whose weights are the result, not wrapped.
            progress: with the epoch counted.
            is_best: save the weights in best/ too.

        Raises:
            OSError: see `save_state`.
        """
        data = self.recipe.model_dump(include={"input_size", "mean", "std", "crop_pct", "interpolation"})
        metadata = run_metadata(self.recipe)
        with self._saying_what_is_left(progress):
            for path in (self.path, *([self.path / "best"] if is_best else [])):
                path.mkdir(exist_ok=True)
                write_text(path / "recipe.yaml", self.recipe.yaml())
                write_whole(path / "config.json", lambda file: save_config_for_hf(model, str(file), data_config=data))
                write_whole(path / "model.safetensors", lambda file: write_weights(model, file, metadata))
            self._write_curve(progress)

    @contextmanager
    def _saying_what_is_left(self, progress: Progress) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            left = self.states()
            kept = f"{left[-1].name} is whole: make room and add --resume" if left else "make room and start again"
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(f"{progress.place} could not be saved in {self.path} ({cause}); {kept}") from error

    def _write_curve(self, progress: Progress) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=progress.curve[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(progress.curve)
        write_text(self.path / "curve.csv", text.getvalue())

    def _refuse_foreign_files(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose another --output-dir")
        for name in ("model.safetensors", "config.json"):
            if (self.path / name).exists():
                raise InputError(f"{self.path} holds a {name} that no run of ours wrote; choose another --output-dir")


def run_metadata(recipe: Recipe) -> dict[str, str]:
    """Return what a file of weights says of the run that they are of: recipe and hash, seed, version of the code."""
    return {"recipe": f"{recipe.name} {recipe.hash()}", "seed": str(recipe.seed), "commit": code_version()}


def read_curve(folder: str | Path) -> list[dict[str, str]]:
    """Read the rows of a run's curve.csv, one an epoch."""
    with open(Path(folder) / "curve.csv", newline="") as file:
        return list(csv.DictReader(file))


def _differences(saved: Recipe, wanted: Recipe) -> str:
    pairs = {key: (value, getattr(wanted, key)) for key, value in saved if key not in FREE}
    return ", ".join(f"{key}: {old} there, {new} here" for key, (old, new) in pairs.items() if old != new)
