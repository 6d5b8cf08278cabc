"""How fast a deconvolution network is beside the batch-norm network of the same shape, on this machine."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor, nn

from timm_deconv.convert import fuse
from timm_deconv.errors import InputError, unknown_name
from timm_deconv.timing import interleave, synchroniser

from .description import taking_images
from .pretrained import batch_norm_name
from .registration import list_models

__all__ = ["Speed", "measure_speed"]


@dataclass(frozen=True)
class Speed:
    """How fast one form of a network is: medians over the rounds.

    Attributes:
        task: 'training' (forward and backward pass) or 'inference'.
        form: 'deconvolution', 'folded' (whitening folded away) or 'batch norm'.
        images_per_second: of steps of the given size.
        milliseconds: of a step.
        times_batch_norm: a step's time over that of batch norm in the same round.
    """

    task: str
    form: str
    images_per_second: float
    milliseconds: float
    times_batch_norm: float


def measure_speed(
    network: str,
    *,
    batch_size: int = 32,
    image_size: int | None = None,
    rounds: int = 7,
    device: str = "cpu",
    progress: Callable[[str], object] = lambda message: None,
) -> list[Speed]:
    """Time training and evaluation steps of a network's forms on random images, in turns.

    Args:
        network: a registered deconvolution network.
        batch_size: images a step.
        image_size: height and width; None for the network's own.
        rounds: measurements of each form and task, after one that does not count.
        device: 'cpu' or 'cuda'.
        progress: is told of each round.

    Raises:
        InputError: no such network, a number that is not positive, or images that the network cannot take.
    """
    if network not in list_models():
        raise unknown_name("deconvolution network", network, list_models())
    for name, value in {"batch size": batch_size, "image size": image_size, "rounds": rounds}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: it is a positive number")
    model, twin = (timm.create_model(name).to(device) for name in (network, batch_norm_name(network)))
    channels, *size = timm.data.resolve_data_config(model=model)["input_size"]
    images = torch.randn(batch_size, channels, *([image_size] * 2 if image_size else size), device=device)
    tasks = {
        "training": (_train, {"deconvolution": model.train(), "batch norm": twin.train()}),
        "inference": (_infer, {"deconvolution": model, "folded": fuse(model), "batch norm": twin}),
    }
    speeds: list[Speed] = []
    for task, (step, forms) in tasks.items():
        for each in forms.values():
            each.train(task == "training")
        actions = {form: _bound(step, each, images) for form, each in forms.items()}
        how: dict[str, Any] = {"rounds": rounds, "synchronise": synchroniser(device), "progress": progress}
        with taking_images(images.shape):
            speeds += _speeds(task, actions, batch_size, **how)
    return speeds


def _bound(step: Callable[[nn.Module, Tensor], object], model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: step(model, images)


def _train(model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    model(images).square().mean().backward()


@torch.inference_mode()
def _infer(model: nn.Module, images: Tensor) -> None:
    model(images)


def _speeds(task: str, actions: Mapping[str, Callable[[], object]], batch_size: int, **how: Any) -> Iterator[Speed]:
    timings = interleave(actions, warmup=1, **how)
    for form in actions:
        seconds = timings.spread(form).median
        yield Speed(task, form, batch_size / seconds, 1000 * seconds, timings.ratio(form, "batch norm").median)
