"""The output folder of a run: weights that timm loads, the state to resume from, the recipe, the curve.

model.safetensors, config.json   `timm.create_model('local-dir:OUT', pretrained=True)`
state/epoch-0003/                accelerate's state after three epochs; the one before stays until this is whole
recipe.yaml  curve.csv  results.csv  tensorboard/
"""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_deconv.errors import InputError
from timm_deconv.models.weights import write_weights

from .atomic_io import flush, remove, write_text, write_whole
from .recipe import Recipe, load_recipe

# may differ between a run and its continuation
FREE = {"name", "data_dir", "pretrained_path", "dataset_download", "workers", "log_interval", "max_unreadable"}


@dataclass
class Progress:
    """How far a run is: finished epochs, updates made, seconds spent in all and in training alone, one row an epoch."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


class RunFolder:
    """The output folder of one run.

    Args:
        path: created by `open` where it is missing.
        recipe: the run's.
    """

    def __init__(self, path: str | Path, recipe: Recipe):
        self.path = Path(path)
        self.recipe = recipe

    def check(self, resume: bool) -> None:
        """Check that the run may write here. A run that ended before its first epoch did may begin with other settings.

        Raises:
            InputError: the folder holds another recipe's run, weights of unknown origin, or this run and `resume` is
                not set.
        """
        saved, weights = self.path / "recipe.yaml", self.path / "model.safetensors"
        if not saved.exists():
            self._refuse_foreign_files()
        elif self.states() or weights.exists():
            if differing := _differences(load_recipe(str(saved)), self.recipe):
                raise InputError(
                    f"{self.path} holds a run of other settings ({differing}); choose another --output-dir"
                )
            if not resume:
                raise InputError(f"{self.path} holds this run already; add --resume, or choose another --output-dir")

    def open(self) -> None:
        """Create the folder, with the recipe in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "recipe.yaml", self.recipe.yaml())

    def states(self) -> list[Path]:
        """List the whole states, the latest last."""
        return sorted((self.path / "state").glob("epoch-*"))

    def save(self, accelerator: Accelerator, model: nn.Module, ema: nn.Module | None, progress: Progress) -> None:
        """Save weights, curve and state of a finished epoch; all processes call it.

        Args:
            accelerator: holds what is needed to resume.
            model: the network whose weights are the result, not wrapped.
            ema: the averaged network where there is one.
            progress: with the epoch counted.

        Raises:
            OSError: something could not be written, e.g. on a full disk. What was saved before is whole.
        """
        try:
            if accelerator.is_main_process:
                self._export(model)
                self._write_curve(progress)
            self._save_state(accelerator, ema, progress)
        except (OSError, RuntimeError, SafetensorError) as error:
            left = self.states()
            kept = f"{left[-1].name} is whole: make room and add --resume" if left else "make room and start again"
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(f"epoch {progress.epoch} could not be saved in {self.path} ({cause}); {kept}") from error

    def load(self, accelerator: Accelerator, ema: nn.Module | None) -> Progress:
        """Restore the latest whole state into what was prepared; return a fresh Progress where there is none."""
        states = self.states()
        if not states:
            return Progress()
        accelerator.load_state(str(states[-1]))
        if ema is not None:
            ema.load_state_dict(safetensors.torch.load_file(states[-1] / "ema.safetensors"))
        return Progress(**json.loads((states[-1] / "progress.json").read_text()))

    def _export(self, model: nn.Module) -> None:
        data = self.recipe.model_dump(include={"input_size", "mean", "std", "crop_pct", "interpolation"})
        write_whole(self.path / "config.json", lambda file: save_config_for_hf(model, str(file), data_config=data))
        write_whole(self.path / "model.safetensors", lambda file: write_weights(model, file))

    def _write_curve(self, progress: Progress) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=progress.curve[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(progress.curve)
        write_text(self.path / "curve.csv", text.getvalue())

    def _save_state(self, accelerator: Accelerator, ema: nn.Module | None, progress: Progress) -> None:
        partial = self.path / "state" / ".partial"
        if accelerator.is_main_process:
            remove(partial)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        if ema is not None:
            write_weights(ema, partial / "ema.safetensors")
        (partial / "progress.json").write_text(json.dumps(asdict(progress)))
        flush(partial)
        older = self.states()
        partial.rename(self.path / "state" / f"epoch-{progress.epoch:04d}")
        for state in older:
            remove(state)

    def _refuse_foreign_files(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose another --output-dir")
        for name in ("model.safetensors", "config.json"):
            if (self.path / name).exists():
                raise InputError(f"{self.path} holds a {name} that no run of ours wrote; choose another --output-dir")


def read_curve(folder: str | Path) -> list[dict[str, str]]:
    """Read the rows of a run's curve.csv, one an epoch."""
    with open(Path(folder) / "curve.csv", newline="") as file:
        return list(csv.DictReader(file))


def _differences(saved: Recipe, wanted: Recipe) -> str:
    pairs = {key: (value, getattr(wanted, key)) for key, value in saved if key not in FREE}
    return ", ".join(f"{key}: {old} there, {new} here" for key, (old, new) in pairs.items() if old != new)
