"""What the training loop and its loader add to a bare loop over the same network."""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.timing import Timings, interleave
from timm_deconv.training import Recipe, load_recipe
from timm_deconv.training.checkpoint import Progress, RunFolder
from timm_deconv.training.loop import Trainer
from timm_deconv.training.processes import create_accelerator
from timm_deconv.training.tasks import create_task

from .rows import CONDITIONS, Row, conditions, rounded

__all__ = ["COLUMNS", "SHOWN", "LoopSettings", "loop_rows"]

OVERHEADS = [f"{kind}{edge}" for kind in ("overhead", "cpu_overhead") for edge in ("", "_lower", "_upper")]

COLUMNS = [*"network width batch workers updates script bare".split(), *OVERHEADS, "rounds", *CONDITIONS]

SHOWN = COLUMNS[:13]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What is timed: epochs of `updates` updates of the recipe `cifar10_e1`, on a processor.

    Attributes:
        data_dir: folder of train/ and val/ (or tars), of images by class.
        network, width: a registered name, and what multiplies its channels, in networks that have the argument.
        batch, workers: images in a batch, and processes that load them.
        updates: of a measurement; the start of the workers is in it.
        rounds, warmup: see `timing.interleave`.

    Raises:
        InputError: a network that is not registered.
    """

    data_dir: str
    network: str = "resnet18_cifar"
    width: float | None = None
    batch: int = 128
    workers: int = 2
    updates: int = 16
    rounds: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        if not timm.is_model(self.network):
            raise InputError(f"network={self.network!r} is none of timm.list_models()")

    def recipe(self) -> Recipe:
        """Return the recipe that is timed."""
        images = self.batch * self.updates
        network = {"model": self.network, "model_kwargs": {} if self.width is None else {"width": self.width}}
        data = {"dataset": "", "data_dir": self.data_dir, "train_images": images, "val_images": 10}
        loader = {"batch_size": self.batch, "workers": self.workers}
        return load_recipe("cifar10_e1").merged({**network, **data, **loader})


def loop_rows(settings: LoopSettings, progress: Callable[[str], object] = print) -> Iterator[Row]:
    """Measure a row: seconds of an update by the script and by the bare loop, and by which share they differ.

    `overhead` is that of the clock, `cpu_overhead` that of the processors' time, workers included: what a machine with
    nothing to spare pays, whatever else runs on it.

    The script's loop reads files, augments, normalises, checks losses, counts and logs. The bare one has its batches in
    memory, augmented and normalised, and does nothing but forward pass, backward pass and SGD.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = settings.recipe()
        accelerator = create_accelerator(recipe, Path(folder), cpu=True)
        task = create_task(recipe, accelerator.device)
        trainer = Trainer(recipe, task, RunFolder(folder, recipe), accelerator)
        accelerator.init_trackers(recipe.name)
        batches = [(task.normalise(images), targets) for images, targets in trainer.train_loader]
        actions = {"script": _script(trainer), "bare": _bare(copy.deepcopy(trainer.network).train(), batches, recipe)}
        spent: dict[str, list[float]] = {label: [] for label in actions}
        counted = {label: _counted(action, spent[label]) for label, action in actions.items()}
        timings = interleave(counted, rounds=settings.rounds, warmup=settings.warmup, progress=progress)
        accelerator.end_training()
    cpu = Timings({label: seconds[settings.warmup :] for label, seconds in spent.items()})
    overheads = [timings.ratio("script", "bare"), cpu.ratio("script", "bare")]
    edges = [edge for ratio in overheads for edge in (ratio.median, ratio.lower, ratio.upper)]
    yield {
        **{key: getattr(settings, key) for key in ("network", "batch", "workers", "updates", "rounds")},
        "width": "" if settings.width is None else settings.width,
        **{label: rounded(timings.spread(label).median / settings.updates) for label in actions},
        **{name: rounded(edge - 1) for name, edge in zip(OVERHEADS, edges, strict=True)},
        **conditions("cpu"),
    }


def _counted(action: Callable[[], None], spent: list[float]) -> Callable[[], None]:
    """Note the processors' time of an action, that of the workers that it has ended included."""

    def act() -> None:
        before = sum(os.times()[:4])
        action()
        spent.append(sum(os.times()[:4]) - before)

    return act


def _script(trainer: Trainer) -> Callable[[], None]:
    def epoch() -> None:
        trainer.progress = Progress()
        trainer.train_epoch()
        trainer.guard.finish()

    return epoch


def _bare(model: nn.Module, batches: list[tuple[Tensor, Tensor]], recipe: Recipe) -> Callable[[], None]:
    optimizer = create_optimizer_v2(
        model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )

    def epoch() -> None:
        for images, targets in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()

    return epoch
