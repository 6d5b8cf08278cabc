"""Checks before anything goes up: finite outputs, the folded form's too, and the recorded accuracy once more."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.training.evaluation import evaluation_recipe, validate
from timm_deconv.training.processes import create_accelerator
from timm_deconv.training.tasks import create_task

from .source import Source

__all__ = ["Measured", "check_outputs", "measure"]

TOLERANCE = 0.1
"""Points by which the accuracy may miss the recorded one: other hardware rounds otherwise."""

FOLDING_ERROR = 1e-3
"""Of the largest output: folding multiplies in another order, in float32."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Attributes:
        figure: `top1`, or `miou`.
        value: in per cent.
        images: of how many.
        data: the last part of the name of the folder that they were in; '' where the data set has its own place.
        class_names: of the images, where they are known.
    """

    figure: str
    value: float
    images: int
    data: str
    class_names: tuple[str, ...]


@torch.no_grad()
def check_outputs(model: nn.Module, folded: nn.Module | None) -> None:
    """Check that a network's outputs are finite, and that its folded form has the same.

    Args:
        model: with `pretrained_cfg`, in evaluation.
        folded: what `timm_deconv.fuse` makes of it; None of a network without whitening.

    Raises:
        InputError: they are not.
    """
    size: Any = model.pretrained_cfg["input_size"]  # type: ignore[index, union-attr]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    output = _finite(model(images), "the network")
    if folded is None:
        return
    error = float((_finite(folded(images), "its folded form") - output).abs().max() / output.abs().max())
    if not error < FOLDING_ERROR:
        raise InputError(f"folded, the network gives other outputs (by {error:.1e} of the largest); calibrate it anew")


def _finite(output: Tensor, which: str) -> Tensor:
    if not output.isfinite().all():
        raise InputError(f"{which} gives outputs that are NaN or infinite: train it anew, or publish best/ of the run")
    return output


def measure(source: Source, data_dir: str | Path | None = None) -> Measured | None:
    """Evaluate a network on the data set it was trained for, and compare with what its run recorded.

    Args:
        source: the network; one that no run of ours trained is evaluated where `data_dir` is given.
        data_dir: of the images, where they are no longer in the recipe's folder.

    Returns:
        What was found; None where nothing says which images.

    Raises:
        InputError: the images cannot be had, or the accuracy misses the recorded one by more than TOLERANCE.
    """
    if source.recipe is None and data_dir is None:
        return None
    chosen = {} if data_dir is None else {"data_dir": str(data_dir)}
    try:
        recipe = evaluation_recipe(str(source.folder), source.model, None, chosen)
        accelerator = create_accelerator(recipe)
        task = create_task(recipe, accelerator.device)
        figures = validate(source.model, task, accelerator)
        accelerator.end_training()
    except (InputError, OSError) as error:
        reason = f"the accuracy cannot be measured ({error})"
        raise InputError(f"{reason}: give --data-dir, or --no-eval to skip it") from None
    source.model.to("cpu", memory_format=torch.contiguous_format)
    value, recorded = figures[task.headline], source.recorded
    if recorded is not None and not abs(value - recorded) <= TOLERANCE:
        raise InputError(
            f"{source.folder}: {value:.2f} % on {figures['images']} images, where its run recorded {recorded:.2f} %:"
            " give its own weights, and its images by --data-dir (--no-eval leaves it out, and the card says so)"
        )
    data = Path(recipe.data_dir).resolve().name if recipe.data_dir else ""
    names = tuple(getattr(task, "class_names", None) or ())
    return Measured(task.headline, value, int(figures["images"]), data, names)
