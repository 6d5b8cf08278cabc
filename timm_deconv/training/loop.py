"""The training loop: accelerate's processes and precision, timm's optimisers and schedules, our checks and records."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from tqdm import tqdm

from timm_deconv.convert import convert_sync
from timm_deconv.errors import InputError, NonFiniteError
from timm_deconv.linalg import widest
from timm_deconv.models.weights import follow_saved, saved_arguments

from . import results
from .checkpoint import Progress, RunFolder
from .compiling import compile_regions
from .evaluation import evaluate
from .health import whitening_health
from .nan_guard import NanGuard
from .optimisation import clip_gradients, create_optimizer, create_scheduler
from .processes import Processes, average_buffers, create_accelerator, lost_process_named
from .recipe import Recipe
from .recovery import Recovery
from .reporting import Reporter, best_epoch, profiled
from .run_state import RunState
from .saving import Saver
from .signals import Signals
from .tasks import Batch, Task, create_task


def train(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    record: bool = False,
    cpu: bool = False,
    profile: bool = False,
    task: Callable[[Recipe, torch.device], Task] = create_task,
) -> dict[str, object]:
    """Train a recipe into a folder; see `checkpoint` for what lies there afterwards.

    Args:
        recipe: the settings.
        output_dir: of this run alone.
        resume: continue from the latest whole state where there is one; bit for bit on the same machine.
        record: add the result row to `hub_configs/results` of the checkout too.
        cpu: stay on the processor where there is a GPU.
        profile: write which operations a few updates consist of into the folder; see `reporting.profiled`.
        task: makes what the run is about from the recipe and the device; by default what the data set is for.

    Returns:
        The result row.

    Raises:
        InputError: something in the recipe, the data or the folder cannot be used.
        NonFiniteError: the loss or a weight became NaN or infinite; the last state is whole.
        OSError: an unreadable image, a full disk, or another process that is gone; the last state is whole.
        Stopped: SIGTERM or SIGUSR1 came, and the run has saved itself.
    """
    folder = RunFolder(output_dir, recipe)
    folder.check(resume)
    record_to = results.record_path(recipe) if record else None
    accelerator = create_accelerator(recipe, folder.path, cpu)
    random_seed(recipe.seed)
    try:
        with lost_process_named():
            trainer = Trainer(recipe, task(recipe, accelerator.device), folder, accelerator)
            row = trainer.run(resume, profile)
    finally:
        accelerator.end_training()
    if record_to and accelerator.is_main_process:
        results.append_row(record_to, row, trainer.task.headline)
    return row


class Trainer:
    """One run of a recipe.

    Args:
        recipe: the settings.
        task: data, loss and figures.
        folder: where the run is saved.
        accelerator: from `create_accelerator`.
    """

    def __init__(self, recipe: Recipe, task: Task, folder: RunFolder, accelerator: Accelerator):
        self.recipe, self.task, self.folder, self.accelerator = recipe, task, folder, accelerator
        self.progress, self.clock = Progress(), time.perf_counter()
        self.processes = Processes(accelerator.num_processes, accelerator.process_index, recipe.process_timeout)
        self.network = task.create_model()  # without what accelerate puts around it: processes, compilation
        with accelerator.main_process_first():  # which downloads
            self.train_loader, val_loader = task.create_loaders()
        for key in ("label_names", "label_descriptions"):  # of weights to start from
            self.network.pretrained_cfg.pop(key, None)
        if names := task.class_names:  # which config.json tells
            self.network.pretrained_cfg.update(label_names=list(names), num_classes=len(names))
        self.order = self.train_loader.batch_sampler
        self.order.process, self.order.processes = accelerator.process_index, accelerator.num_processes
        task.calibrate(self.network.to(accelerator.device))
        if recipe.sync_statistics and self.processes.group is not None:
            self.network = convert_sync(self.network, host_group=self.processes.group)
        optimizer = create_optimizer(self.network, recipe)
        if recipe.torchcompile and recipe.torchcompile_regions:
            compile_regions(self.network, recipe.torchcompile, recipe.torchcompile_mode)
        self.scheduler = create_scheduler(optimizer, recipe, len(self.train_loader))
        with warnings.catch_warnings():
            # torch 2.14 renames an argument that older ones know by this name alone
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # the training loader has its own order and shares
            self.model, self.optimizer, self.val_loader = accelerator.prepare(self.network, optimizer, val_loader)
        self.ema: ModelEmaV3 | None = None
        if recipe.model_ema:
            self.ema = ModelEmaV3(self.network, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
        self.averaged: nn.Module | None = None if self.ema is None else self.ema.module
        self.result = self.network if self.averaged is None else self.averaged  # what is evaluated and saved
        state = RunState(accelerator, self.processes, self.network, self.averaged, self.optimizer, self.scheduler)
        self.signals = Signals()
        self.report = Reporter(recipe, accelerator, task.headline, self._images_per_epoch)
        self.say = self.report.say
        self.saver = Saver(folder, state, self.processes, self.signals, self.say)
        self.recovery = Recovery(recipe, self.network, self.saver.rewind)
        self.guard = NanGuard(self.network, self.processes, at_once=self.recovery.active)
        self.count_update: Callable[[], None] = lambda: None
        self._reset_figures()

    def run(self, resume: bool, profile: bool = False) -> dict[str, object]:
        """Train to the last epoch and return the result row."""
        device, traces = self.accelerator.device, self.folder.path / "profile"
        is_profiled = profile and self.accelerator.is_main_process
        with self.signals, profiled(traces if is_profiled else None, device, self.say) as self.count_update:
            self._open(resume)
            while self.progress.epoch < self.recipe.epochs:
                self._epoch()
        return self._finish()

    def _open(self, resume: bool) -> None:
        self.processes.main_does(lambda: self.folder.open(self.saver.state.size()))
        state = self.saver.load() if resume else None
        if state is not None:
            self._resume(state)
        elif self.recovery.mode == "rewind":
            self.saver.save(self.progress, self._own())
        self.processes.main_does(self.report.open)

    def _resume(self, state: dict[str, Any]) -> None:
        for network in filter(None, (self.network, self.averaged)):
            follow_saved(network, saved_arguments(self.folder.path))
        saved = self.saver.state.restore(state)
        self.progress = Progress(**saved[0]["progress"])
        if len(saved) == self.processes.number:
            self.total, self.images = (saved[self.processes.index][name] for name in ("total", "images"))
        elif self.accelerator.is_main_process:
            self.total, self.images = (sum(own[name] for own in saved) for name in ("total", "images"))
        self.total = self.total.to(self.accelerator.device)
        if self.progress.consumed and len(saved) != self.processes.number:
            self._seed()
            self.say(f"saved by {len(saved)} processes: the images stay the same, random numbers of layers do not")
        self.say(
            f"resumed from {self.progress.place}: {self.progress.epoch} of {self.recipe.epochs} epochs and"
            f" {self.progress.consumed} of {self._images_per_epoch} images"
        )

    @property
    def _images_per_epoch(self) -> int:
        return len(self.train_loader) * self.recipe.batch_size

    def _epoch(self) -> None:
        self.clock = time.perf_counter()
        if self.progress.consumed < self._images_per_epoch:
            self.train_epoch()
            self.guard.finish()
            for network in filter(None, (self.network, self.averaged)):
                average_buffers(self.accelerator, network)
            self._count_time(training=True)
        validation = evaluate(self.task, self.result, self._interruptible(self.val_loader), self.accelerator)
        self._count_time(training=False)
        training = self._summarise_training()
        self.progress.epoch += 1
        self.progress.consumed = 0
        self._reset_figures()
        self.report.epoch(self.progress, training, validation)
        is_best = best_epoch(self.progress, self.task.headline) is self.progress.curve[-1]
        self.processes.main_does(lambda: self.folder.export(self.result, self.progress, is_best))
        self.saver.save(self.progress, self._own())

    def train_epoch(self) -> None:
        """Train on what is left of the epoch."""
        if self.progress.consumed == 0:
            self._seed()
        self.order.epoch, self.order.consumed = self.progress.epoch, self.progress.consumed
        self.task.begin_epoch(self.progress.epoch)
        self.model.train()
        with self.report.bar(self.train_loader, self.progress) as bar:
            for each in bar:
                batch = send_to_device(each, self.accelerator.device, non_blocking=True)
                figures = self._batch(batch)
                self.total += figures.sum(0)
                self.images += len(figures)
                if self.accelerator.sync_gradients:
                    self._after_update(bar, batch)

    def _after_update(self, bar: tqdm, batch: Batch) -> None:
        self.count_update()
        step, recipe = self.progress.step, self.recipe
        if step % recipe.log_interval == 0 and self.images:
            rate = self.optimizer.param_groups[0]["lr"]
            bar.set_postfix(
                self.report.training(step, self.task.summarise(self.total, self.images), rate), refresh=False
            )
        if recipe.health_interval and step % recipe.health_interval == 0:
            health = whitening_health(self.network, lambda: self.task.loss(self.network, batch))
            self.report.log(step, {f"whitening/{name}": value for name, value in health.items()})
        if self.progress.consumed == self._images_per_epoch:
            return  # evaluation and the epoch's own state follow
        if self.saver.is_told_to_end():
            self.saver.stop(*self._ready_to_save())
        if self.saver.is_due(step):
            self.saver.try_to_save(*self._ready_to_save())
            self.clock = time.perf_counter()

    def _interruptible(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass evaluation batches on as long as no signal tells the run to end."""
        for batch in batches:
            if self.saver.is_told_to_end():
                self._count_time(training=False)
                self.saver.stop(self.progress, self._own())
            yield batch

    def _ready_to_save(self) -> tuple[Progress, dict[str, Any]]:
        self.guard.finish()
        self._count_time(training=True)
        return self.progress, self._own()

    def _own(self) -> dict[str, Any]:
        """Return what this process alone knows of the epoch so far."""
        return {"total": self.total, "images": self.images}

    def _reset_figures(self) -> None:
        device = self.accelerator.device
        self.total, self.images = torch.zeros(len(self.task.columns), device=device, dtype=widest(device)), 0

    def _count_time(self, training: bool) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.progress.training_seconds += now - self.clock if training else 0
        self.clock = now

    def _seed(self) -> None:
        """Seed the random numbers of layers, by the place in the run and by process."""
        place = 1_000_003 * (self.progress.epoch + 1) + self.progress.consumed
        random_seed((self.recipe.seed + place) % 2**31, self.accelerator.process_index)

    def _summarise_training(self) -> dict[str, float]:
        figures = self.accelerator.reduce(torch.cat([self.total, self.total.new_tensor([self.images])]), "sum")
        return dict(self.task.summarise(figures[:-1], int(figures[-1])))

    def _batch(self, batch: Batch) -> Tensor:
        """Make a forward and a backward pass, and an update where one is due; return the figures (B, columns)."""
        self.progress.consumed += self.recipe.batch_size
        passes, accumulated = self.progress.consumed // self.recipe.batch_size, self.recipe.grad_accum_steps
        is_due = passes % accumulated == 0 or passes == len(self.train_loader)
        self.accelerator.sync_gradients = is_due
        self.recovery.begin_pass(first=passes % accumulated == 1 or accumulated == 1)
        place = f"epoch {self.progress.epoch + 1}, update {self.progress.step + 1}"
        with nullcontext() if is_due else self.accelerator.no_sync(self.model):
            loss, figures = self._loss(batch)
            try:
                self.guard.step(loss, lambda: self.task.loss(self.network, batch), place)
                self.accelerator.backward(loss)
                if is_due and self.recovery.active and self.accelerator.scaler is None:
                    self.guard.check_gradients(place)
            except NonFiniteError as error:
                self.recovery.spoil(error, self.progress.left_out)
                self.say(str(error))
                figures = figures[:0]
        if is_due:
            self._update()
        return figures

    def _update(self) -> None:
        self.progress.step += 1
        if self.recovery.spoilt:
            self.progress.left_out += 1
            done = self.recovery.undo()
            self.say(f"update {self.progress.step} is {done} ({self.progress.left_out} of {self.recovery.limit})")
        else:
            if self.recipe.clip_grad is not None:
                self.accelerator.unscale_gradients()
                clip_gradients(self.network, self.optimizer, self.recipe.clip_grad, self.recipe.clip_mode)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step_update(self.progress.step)
        if self.ema is not None and not self.recovery.spoilt:
            self.ema.update(self.network, self.progress.step)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        try:
            return self.task.loss(self.model, batch)
        except ValueError as error:
            if isinstance(error, InputError) or "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"batch_size={self.recipe.batch_size} gives a batch norm of {self.recipe.model} one value a channel,"
                " which has no variance; raise it"
            ) from error

    def _finish(self) -> dict[str, object]:
        headline, curve = self.task.headline, self.progress.curve
        row = {
            **results.describe_run(self.recipe),
            headline: curve[-1][headline],
            f"best_{headline}": best_epoch(self.progress, headline)[headline],
            "train_loss": curve[-1]["train_loss"],
            "seconds": round(self.progress.seconds, 1),
            "images_per_second": round(self.report.speed(self.progress), 1),
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "processes": self.accelerator.num_processes,
            **results.describe_machine(self.accelerator.device),
        }
        path = self.folder.path / "results.csv"
        if self.accelerator.is_main_process and not path.exists():
            results.append_row(path, row, headline)
        self.report.summary(self.progress, self.folder.path)
        return row
