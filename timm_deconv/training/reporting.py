"""What a run tells its user: a bar of images, a line for each epoch, scalars for trackers, and where it ended."""

import datetime
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from timm_deconv.errors import InputError

from .checkpoint import Progress
from .recipe import Recipe

__all__ = ["Reporter", "best_epoch", "create_trackers", "profiled"]

PROJECT = "timm_deconv"
"""Under which wandb and trackio keep runs."""

WAITED, WARMED_UP, PROFILED = 4, 2, 4
"""Updates of a run before a profile, those that warm it up, and those in it."""


def create_trackers(recipe: Recipe, folder: Path) -> list[GeneralTracker]:
    """Create accelerate's trackers of the recipe; tensorboard writes into the run's folder.

    Raises:
        InputError: one is not installed.
    """
    trackers = []
    for name in recipe.log_with:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log_with: {name} is not installed; pip install {name}, or leave it out")
        kind = LOGGER_TYPE_TO_CLASS[name]
        own = kind("tensorboard", folder) if kind.requires_logging_directory else kind(PROJECT, name=str(folder))
        trackers.append(own)
    return trackers


class Reporter:
    """Speaks for the run, in its main process alone.

    Args:
        recipe: the settings.
        accelerator: sends scalars to the trackers.
        headline: the figure that is said and by which epochs are compared.
        images: in an epoch.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, headline: str, images: int) -> None:
        self.recipe, self.accelerator, self.headline, self.images = recipe, accelerator, headline, images

    def open(self) -> None:
        """Start the trackers.

        Raises:
            InputError: one does not start, as it is not logged in, for example.
        """
        try:
            self.accelerator.init_trackers(self.recipe.name)
        except Exception as error:  # whatever their packages raise
            self.accelerator.trackers.clear()  # of which some have not started, and cannot end
            reason = " ".join(str(error).split()) or type(error).__name__
            names = ", ".join(self.recipe.log_with)
            raise InputError(f"log_with: one of {names} does not start ({reason}); leave it out") from error

    def say(self, text: str) -> None:
        """Say a line."""
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr, flush=True)

    def bar(self, batches: Any, progress: Progress) -> tqdm:
        """Wrap the batches of an epoch in a bar of images, shown where there is a terminal."""
        return tqdm(
            batches,
            total=len(batches),
            initial=progress.consumed // self.recipe.batch_size,
            desc=f"epoch {progress.epoch + 1}/{self.recipe.epochs}",
            unit="img",
            unit_scale=self.recipe.batch_size,
            disable=None if self.accelerator.is_main_process else True,
            leave=False,
            dynamic_ncols=True,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars to the trackers."""
        self.accelerator.log(dict(values), step=step)

    def training(self, step: int, figures: Mapping[str, float], rate: float) -> dict[str, str]:
        """Log loss and headline of an epoch so far and the learning rate; return the former as a bar shows them."""
        shown = {name: figures[name] for name in ("loss", self.headline)}
        self.log(step, {f"train/{name}": value for name, value in shown.items()} | {"lr": rate})
        return {name: f"{value:.4g}" for name, value in shown.items()}

    def epoch(self, progress: Progress, training: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """Add the epoch that `progress` has just counted to its curve, log it, and say how long the run will take."""
        headline, epochs = self.headline, self.recipe.epochs
        row = {
            "epoch": progress.epoch,
            "train_loss": round(training["loss"], 5),
            f"train_{headline}": round(training[headline], 3),
            headline: round(validation[headline], 3),
            "seconds": round(progress.seconds, 2),
        }
        progress.curve.append(row)
        speed = self.speed(progress)
        values = {f"validation/{name}": value for name, value in validation.items()}
        self.log(progress.step, {**values, "train/images_per_second": speed})
        left = progress.seconds / progress.epoch * (epochs - progress.epoch)
        self.say(
            f"epoch {row['epoch']}/{epochs}: loss {training['loss']:.4f}, {headline} in training "
            f"{training[headline]:.2f} %, in evaluation {validation[headline]:.2f} %, {speed:.0f} images/s, "
            f"{row['seconds']:.0f} s, {datetime.timedelta(seconds=round(left))} left"
        )

    def speed(self, progress: Progress) -> float:
        """Return the images a second of training, evaluation left out."""
        return progress.epoch * self.images / max(progress.training_seconds, 1e-9)

    def summary(self, progress: Progress, folder: Path) -> None:
        """Say which epoch was best, where it lies, and what comes next."""
        best = best_epoch(progress, self.headline)
        self.say(
            f"best of {len(progress.curve)} epochs: {best['epoch']}, {self.headline} {best[self.headline]:.2f} %, in"
            f" {folder / 'best'}; the last one is in {folder}\n"
            f"go on: timm-deconv validate {folder / 'best'}"
        )


def best_epoch(progress: Progress, headline: str) -> dict[str, Any]:
    """Return the row of the first of the best epochs."""
    return max(progress.curve, key=lambda row: row[headline])


@contextmanager
def profiled(folder: Path | None, device: torch.device, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yield what is to be called after each update; a few of them are profiled.

    Args:
        folder: for trace.json, which chrome://tracing and Perfetto show, and operations.txt; None profiles nothing.
        device: its own time is seen too.
        say: tells the user.
    """
    if folder is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]

    kept = False

    def keep(profiler: profile) -> None:
        nonlocal kept
        kept = True
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        order = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
        (folder / "operations.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=40))
        say(f"profile of {PROFILED} updates: {folder}/trace.json, operations.txt")

    steps = schedule(wait=WAITED, warmup=WARMED_UP, active=PROFILED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=keep, acc_events=True) as profiler:
        yield profiler.step
    if not kept:
        say(f"no profile: the run had fewer than {WAITED + WARMED_UP + 1} updates")
