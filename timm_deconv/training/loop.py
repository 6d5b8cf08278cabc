"""The training loop: accelerate's processes and precision, timm's optimisers and schedules, our checks and records."""

import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
)
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, adaptive_clip_grad, dispatch_clip_grad, random_seed
from torch import Tensor, nn
from tqdm import tqdm

from timm_deconv.errors import InputError
from timm_deconv.linalg import widest
from timm_deconv.models.weights import follow_saved, saved_arguments

from . import results
from .checkpoint import Progress, RunFolder
from .evaluation import evaluate
from .lr_scale import scaled_param_groups
from .nan_guard import NanGuard
from .recipe import Recipe
from .tasks import Batch, Task, create_task


def train(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    record: bool = False,
    cpu: bool = False,
    task: Callable[[Recipe, torch.device], Task] = create_task,
) -> dict[str, object]:
    """Train a recipe into a folder; see `checkpoint` for what lies there afterwards.

    Args:
        recipe: the settings.
        output_dir: of this run alone.
        resume: continue from the last whole epoch where there is one; bit for bit on the same machine.
        record: add the result row to `hub_configs/results` of the checkout too.
        cpu: stay on the processor where there is a GPU.
        task: makes what the run is about from the recipe and the device; by default what the data set is for.

    Returns:
        The result row.

    Raises:
        InputError: something in the recipe, the data or the folder cannot be used.
        NonFiniteError: the loss or a weight became NaN or infinite; the last checkpoint is whole.
        OSError: an unreadable image, or a full disk; the last checkpoint is whole.
    """
    folder = RunFolder(output_dir, recipe)
    folder.check(resume)
    record_to = results.record_path(recipe) if record else None
    accelerator = create_accelerator(recipe, folder.path, cpu)
    random_seed(recipe.seed)
    trainer = Trainer(recipe, task(recipe, accelerator.device), folder, accelerator)
    try:
        row = trainer.run(resume)
    finally:
        accelerator.end_training()
    if record_to and accelerator.is_main_process:
        results.append_row(record_to, row, trainer.task.headline)
    return row


def create_accelerator(recipe: Recipe, log_dir: Path | None = None, cpu: bool = False) -> Accelerator:
    """Set accelerate up for loaders of whole batches, of which every process takes its share.

    Args:
        recipe: precision, accumulation and seed.
        log_dir: where tensorboard's log goes; None writes none.
        cpu: stay on the processor where there is a GPU.

    Raises:
        InputError: the batch does not divide into the processes, or the precision is not to be had.
    """
    cpu = cpu or not torch.cuda.is_available()
    if cpu and recipe.amp and recipe.amp_dtype == "float16":
        raise InputError("amp_dtype='float16': a processor would train in float32; set amp_dtype=bfloat16 or amp=false")
    AcceleratorState._reset_state()  # a second run in one process may ask for another precision
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[recipe.amp_dtype] if recipe.amp else "no",
        gradient_accumulation_steps=recipe.grad_accum_steps,
        log_with="tensorboard" if log_dir and is_tensorboard_available() else None,
        project_config=ProjectConfiguration(logging_dir=str(log_dir)) if log_dir else None,
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=recipe.seed, non_blocking=True
        ),
        # whitening matrices are large; `average_buffers` brings them together once an epoch
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if recipe.batch_size % accelerator.num_processes:
        raise InputError(f"batch_size={recipe.batch_size} does not divide into {accelerator.num_processes} processes")
    return accelerator


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
        self.progress = Progress()
        self.network = task.create_model()  # without what accelerate puts around it: processes, compilation
        with accelerator.main_process_first():  # which downloads
            train_loader, val_loader = task.create_loaders()
        task.calibrate(self.network.to(accelerator.device))
        optimizer = create_optimizer(self.network, recipe)
        self.scheduler = create_scheduler(optimizer, recipe, len(train_loader))
        with warnings.catch_warnings():
            # torch 2.14 renames an argument that older ones know by this name alone
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model, self.optimizer, self.train_loader, self.val_loader = accelerator.prepare(
                self.network, optimizer, train_loader, val_loader
            )
        self.ema: ModelEmaV3 | None = None
        if recipe.model_ema:
            self.ema = ModelEmaV3(self.network, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
        self.averaged: nn.Module | None = None if self.ema is None else self.ema.module
        self.result = self.network if self.averaged is None else self.averaged  # what is evaluated and saved
        self.guard = NanGuard(self.network)

    def run(self, resume: bool) -> dict[str, object]:
        """Train to the last epoch and return the result row."""
        self._open(resume)
        while self.progress.epoch < self.recipe.epochs:
            self._epoch()
        return self._finish()

    def _open(self, resume: bool) -> None:
        if self.accelerator.is_main_process:
            self.folder.open()
        self.accelerator.wait_for_everyone()
        if resume:
            for network in filter(None, (self.network, self.averaged)):
                follow_saved(network, saved_arguments(self.folder.path))
            self.progress = self.folder.load(self.accelerator, self.averaged)
        if self.progress.epoch:
            self._say(f"resumed after {self.progress.epoch} of {self.recipe.epochs} epochs")
            self.scheduler.step_update(self.progress.step)
        self.accelerator.init_trackers("tensorboard")

    def _epoch(self) -> None:
        started = time.perf_counter()
        training = self._train_epoch()
        training_seconds = time.perf_counter() - started
        self.guard.finish()
        for network in filter(None, (self.network, self.averaged)):
            average_buffers(self.accelerator, network)
        validation = evaluate(self.task, self.result, self.val_loader, self.accelerator)
        self.progress.epoch += 1
        self.progress.training_seconds += training_seconds
        self.progress.seconds += time.perf_counter() - started
        self._record_epoch(training, validation)
        self.folder.save(self.accelerator, self.result, self.averaged, self.progress)

    def _train_epoch(self) -> dict[str, float]:
        epoch, device = self.progress.epoch, self.accelerator.device
        # order and augmentation depend on seed and epoch alone, so a resumed run continues as if it had never stopped
        random_seed((self.recipe.seed + 1_000_003 * (epoch + 1)) % 2**31, self.accelerator.process_index)
        self.train_loader.set_epoch(epoch)
        self.task.begin_epoch(epoch)
        self.model.train()
        total = torch.zeros(len(self.task.columns), device=device, dtype=widest(device))
        images = 0
        with self._progress_bar() as bar:
            for batch in bar:
                figures = self._batch(batch)
                total += figures.sum(0)
                images += len(figures)
                if self.accelerator.sync_gradients and self.progress.step % self.recipe.log_interval == 0:
                    bar.set_postfix(self._log(total, images), refresh=False)
        total = self.accelerator.reduce(total, "sum")
        return dict(self.task.summarise(total, images * self.accelerator.num_processes))

    def _progress_bar(self) -> tqdm:
        """Wrap the training loader in a bar of images, which the main process shows where there is a terminal."""
        return tqdm(
            self.train_loader,
            desc=f"epoch {self.progress.epoch + 1}/{self.recipe.epochs}",
            unit="img",
            unit_scale=self.recipe.batch_size,
            disable=None if self.accelerator.is_main_process else True,
            leave=False,
            dynamic_ncols=True,
        )

    def _batch(self, batch: Batch) -> Tensor:
        """Make a forward and a backward pass, and an update where one is due; return the figures (B, columns)."""
        with self.accelerator.accumulate(self.model):
            loss, figures = self._loss(batch)
            place = f"epoch {self.progress.epoch + 1}, update {self.progress.step + 1}"
            self.guard.step(loss, lambda: self.task.loss(self.network, batch), place)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.recipe.clip_grad is not None:
                self._clip_gradient(self.recipe.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.progress.step += 1
            self.scheduler.step_update(self.progress.step)
            if self.ema is not None:
                self.ema.update(self.network, self.progress.step)
        return figures

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

    def _clip_gradient(self, bound: float) -> None:
        self.accelerator.unscale_gradients()
        if self.recipe.clip_mode != "agc":
            dispatch_clip_grad(self.network.parameters(), bound, self.recipe.clip_mode)
            return
        clipped = set(model_parameters(self.network, exclude_head=True))
        for group in self.optimizer.param_groups:  # the step is bounded, whatever a group's own rate
            adaptive_clip_grad(clipped.intersection(group["params"]), bound / group.get("lr_scale", 1.0))

    def _log(self, total: Tensor, images: int) -> dict[str, str]:
        """Log loss and headline of the epoch so far; return them as the bar shows them."""
        summary = self.task.summarise(total, images)
        figures = {name: summary[name] for name in ("loss", self.task.headline)}
        values = {f"train/{name}": value for name, value in figures.items()}
        self.accelerator.log({**values, "lr": self.optimizer.param_groups[0]["lr"]}, step=self.progress.step)
        return {name: f"{value:.4g}" for name, value in figures.items()}

    def _record_epoch(self, training: dict[str, float], validation: dict[str, float]) -> None:
        headline = self.task.headline
        row = {
            "epoch": self.progress.epoch,
            "train_loss": round(training["loss"], 5),
            f"train_{headline}": round(training[headline], 3),
            headline: round(validation[headline], 3),
            "seconds": round(self.progress.seconds, 2),
        }
        self.progress.curve.append(row)
        values = {f"validation/{name}": value for name, value in validation.items()}
        self.accelerator.log(values, step=self.progress.step)
        self._say(
            f"epoch {row['epoch']}/{self.recipe.epochs}: loss {training['loss']:.4f}, {headline} in training "
            f"{training[headline]:.2f} %, in evaluation {validation[headline]:.2f} %, {self._speed():.0f} images/s, "
            f"{row['seconds']:.0f} s"
        )

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr, flush=True)

    def _speed(self) -> float:
        images = self.progress.epoch * len(self.train_loader) * self.recipe.batch_size
        return images / max(self.progress.training_seconds, 1e-9)

    def _finish(self) -> dict[str, object]:
        headline, curve = self.task.headline, self.progress.curve
        row = {
            **results.describe_run(self.recipe),
            headline: curve[-1][headline],
            f"best_{headline}": max(epoch[headline] for epoch in curve),
            "train_loss": curve[-1]["train_loss"],
            "seconds": round(self.progress.seconds, 1),
            "images_per_second": round(self._speed(), 1),
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "processes": self.accelerator.num_processes,
            **results.describe_machine(self.accelerator.device),
        }
        path = self.folder.path / "results.csv"
        if self.accelerator.is_main_process and not path.exists():
            results.append_row(path, row, headline)
        return row


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Create timm's optimiser of the recipe."""
    scaled = scaled_param_groups(
        recipe.weight_decay, recipe.filter_bias_and_bn, layers=recipe.layer_rates, auxiliary=recipe.aux_lr_scale
    )
    return create_optimizer_v2(
        model,
        opt=recipe.opt,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        filter_bias_and_bn=recipe.filter_bias_and_bn,
        param_group_fn=scaled if recipe.layer_rates or recipe.aux_lr_scale != 1 else None,
    )


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, batches: int) -> Scheduler:
    """Create timm's schedule of the recipe over all its updates, at its first value, for so many batches an epoch."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        decay_rate=recipe.decay_rate,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=math.ceil(batches / recipe.grad_accum_steps),
    )
    return scheduler


def average_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Replace floating-point buffers (running means, whiteners) by their mean over processes: each saw other images."""
    if accelerator.num_processes == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer.clone(), "mean"))
