"""Does a pretrained network stay the same network? Batch norm, transferred, calibrated and fused, on real photographs.

In training mode a network is another function, which depends on the batch; how far the first training step starts from
the pretrained network is measured too, beside what batch norm does there.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm.data
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_deconv.convert import calibrate, fuse
from timm_deconv.data import StrictImageDataset, chosen_images, class_names
from timm_deconv.errors import InputError
from timm_deconv.models.pretrained import create_batch_norm, create_transferred
from timm_deconv.timing import Spread

from .rows import CONDITIONS, Row, conditions, rounded

__all__ = ["COLUMNS", "SHOWN", "TransferSettings", "transfer_rows"]

COLUMNS = [
    *"network weights preset form images calibration_images batch top1 same_class largest_difference".split(),
    *"milliseconds milliseconds_lower milliseconds_upper".split(),
    *CONDITIONS,
]
SHOWN = "preset form images top1 same_class largest_difference milliseconds".split()


@dataclass(frozen=True)
class TransferSettings:
    """What is compared.

    Attributes:
        data_dir: folder or tar of images, in folders named by ImageNet's synsets.
        network: an ImageNet batch-norm network of timm.
        checkpoint: file of its weights, in place of those that timm or an installed package has.
        presets: of the deconvolution networks.
        images: of the photographs, always the same ones; None for all.
        calibration_images: of them, to calibrate on.
        batch: images of a forward.
    """

    data_dir: str
    network: str = "tf_efficientnet_lite0"
    checkpoint: str | None = None
    presets: Sequence[str] = ("paper", "fast")
    images: int | None = None
    calibration_images: int = 256
    batch: int = 50


@dataclass
class Answers:
    """What a network said of all photographs, and how long it took for each batch, in milliseconds a photograph."""

    logits: list[Tensor] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


def transfer_rows(settings: TransferSettings, progress: Callable[[str], object] = print) -> list[Row]:
    """Compare the forms of a network on photographs, a row each.

    A row has the photographs named rightly in %, how many are named as by batch norm in evaluation, the largest
    difference of a logit from that network's (over its largest logit), and milliseconds a photograph.

    Forms: `batch_norm`, and with each preset `transferred`, `calibrated` and `fused` (of the calibrated one), all in
    evaluation; then forwards in training mode, `batch_norm training` and `calibrated training`, each with the
    statistics of its batch as in the first step of training. The forms take turns in every batch, in the memory format
    channels_last.

    Raises:
        InputError: weights or photographs that are not there or do not fit, or a folder that is no synset of ImageNet.
    """
    reference = create_batch_norm(settings.network, settings.checkpoint).eval()
    loader = _photographs(settings, reference)
    forms: dict[tuple[str, str], nn.Module] = {("", "batch_norm"): reference}
    for preset in settings.presets:
        progress(f"calibrating {preset} on {settings.calibration_images} photographs")
        forms |= {(preset, form): model for form, model in _deconvolution_forms(settings, preset)}
    forms["", "batch_norm training"] = copy.deepcopy(reference).train()
    for model in forms.values():
        model.to(memory_format=torch.channels_last)
    answers = {key: Answers() for key in forms}
    targets = []
    with torch.inference_mode():
        for number, (images, classes) in enumerate(loader):
            progress(f"batch {number + 1} of {len(loader)}")
            targets.append(classes)
            images = images.contiguous(memory_format=torch.channels_last)
            for key, model in forms.items():
                started = time.perf_counter()
                answers[key].logits.append(model(images))
                answers[key].milliseconds.append(1000 * (time.perf_counter() - started) / len(images))
    wanted = torch.cat(answers["", "batch_norm"].logits)
    calibrated_on = min(settings.calibration_images, len(wanted))
    return [
        {
            "network": settings.network,
            "weights": Path(settings.checkpoint).name if settings.checkpoint else "pretrained",
            "preset": preset,
            "form": form,
            "calibration_images": calibrated_on if preset and not form.startswith("transf") else "",
            "batch": settings.batch,
            **_compared(torch.cat(found.logits), wanted, torch.cat(targets)),
            **_timed(found.milliseconds),
            **conditions("cpu"),
        }
        for (preset, form), found in answers.items()
    ]


def _deconvolution_forms(settings: TransferSettings, preset: str) -> Iterator[tuple[str, nn.Module]]:
    model = create_transferred(settings.network, settings.checkpoint, policy=preset).eval()
    yield "transferred", copy.deepcopy(model)
    calibrate(model, _photographs(settings, model, settings.calibration_images))
    yield "calibrated", model
    yield "fused", fuse(model)
    yield "calibrated training", copy.deepcopy(model).train()


def _photographs(settings: TransferSettings, model: nn.Module, images: int | None = None) -> DataLoader[Any]:
    """Load photographs as the network's configuration has them, and their classes in ImageNet's order."""
    if not Path(settings.data_dir).exists():
        raise InputError(f"no photographs {settings.data_dir}: give a folder or tar of images, in folders by synset")
    if getattr(model, "num_classes", None) != len(ImageNetInfo().label_names()):
        raise InputError(f"{settings.network} does not name the 1,000 classes of ImageNet-1k: choose weights that do")
    dataset = StrictImageDataset(settings.data_dir, input_img_mode="RGB")
    known = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
    names = class_names(dataset) or []
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{unknown[0]!r} in {settings.data_dir} is no synset of ImageNet-1k, as n01440764 is one")
    dataset.target_transform = [known[name] for name in names].__getitem__
    cfg = timm.data.resolve_data_config(model=model)
    dataset.transform = timm.data.create_transform(**cfg, is_training=False)
    # all of them too in a random order: sorted by class, a batch would hold one kind of animal, and its statistics too
    chosen = chosen_images(dataset, settings.images or len(dataset))
    return DataLoader(chosen if images is None else chosen_images(chosen, min(images, len(chosen))), settings.batch)


def _compared(logits: Tensor, wanted: Tensor, targets: Tensor) -> Row:
    named = logits.argmax(1)
    return {
        "images": len(targets),
        "top1": rounded(100 * (named == targets).double().mean().item()),
        "same_class": int((named == wanted.argmax(1)).sum()),
        "largest_difference": rounded(((logits - wanted).abs().max() / wanted.abs().max()).item()),
    }


def _timed(milliseconds: list[float]) -> Row:
    spread = Spread.of(milliseconds)
    return {
        "milliseconds": rounded(spread.median),
        "milliseconds_lower": rounded(spread.lower),
        "milliseconds_upper": rounded(spread.upper),
    }
