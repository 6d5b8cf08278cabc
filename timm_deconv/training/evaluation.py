"""Evaluation of a network on the images of a loader."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from timm_deconv.training.tasks import Task


def evaluate(task: Task, model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """The task's figures over all images, each counted once whatever the number of processes; `images` is their number.

    Args:
        task: what to measure.
        model: not wrapped; put into evaluation.
        loader: prepared by the accelerator.
        accelerator: gathers from all processes.
    """
    model.eval()
    total = torch.zeros(len(task.columns), device=accelerator.device, dtype=torch.float64)
    images = 0
    with torch.no_grad(), accelerator.autocast():
        for batch in loader:
            figures = accelerator.gather_for_metrics(task.evaluate(model, batch))
            total += figures.sum(0)
            images += len(figures)
    return {**task.summarise(total, images), "images": images}
