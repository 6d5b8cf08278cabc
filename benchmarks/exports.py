"""Exports of a network and of its batch-norm twin: size, difference, pictures named rightly, time on one picture.

Weights of the files' layers are looked at too: how much the ranges of a layer's channels differ is what eight bits
suffer from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_deconv.convert import calibrate
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.data.evaluation import picture_loader
from timm_deconv.export.network import export_network, open_export
from timm_deconv.export.pictures import labelled_pictures, top1
from timm_deconv.export.plain import plain_form, run
from timm_deconv.models.loading import load_network
from timm_deconv.models.pretrained import create_batch_norm, create_transferred
from timm_deconv.timing import Timings, interleave

from .rows import CONDITIONS, Row, conditions, rounded

__all__ = ["COLUMNS", "RANGES", "SHOWN", "SHOWN_RANGES", "ExportSettings", "export_rows", "range_rows"]

COLUMNS = [
    *"network weights norm form megabytes largest_difference same_class top1 images int8_images".split(),
    *"milliseconds milliseconds_lower milliseconds_upper ratio_to_twin onnxruntime".split(),
    *CONDITIONS,
]
SHOWN = "norm form megabytes largest_difference same_class top1 milliseconds ratio_to_twin".split()
RANGES = [
    *"network weights norm layer weights_of_layer output_channels input_channels kurtosis activations".split(),
    *CONDITIONS,
]
SHOWN_RANGES = "norm layer output_channels input_channels kurtosis activations".split()

FORMS: dict[str, dict[str, Any]] = {
    "safetensors float16": {"format": "safetensors", "half": True},
    "torchscript float32": {"format": "torchscript"},
    "torch-export float32": {"format": "torch-export"},
    "onnx float32": {"format": "onnx"},
    "onnx float16": {"format": "onnx", "half": True},
    "onnx int8": {"format": "onnx"},
}
"""What is exported, and how; the plain network itself, in PyTorch, comes first."""

PYTORCH = "PyTorch float32"
EVALUATED = (PYTORCH, "onnx float32", "onnx int8")
"""Forms whose pictures are counted; the others differ from the first by less than names a picture otherwise."""


@dataclass(frozen=True)
class ExportSettings:
    """What is exported.

    Attributes:
        data_dir: folder or tar of pictures in folders by class, or one with parts for training and evaluation.
        network: an ImageNet batch-norm network of timm, whose weights are transferred, and calibrated on pictures.
        run: in place of these weights, the folder of a run, or of what `calibrate` and `save_network` made.
        twin_run: likewise of the twin, in place of `network` itself.
        calibration_images: pictures that transferred weights are calibrated on.
        int8_images: pictures that ranges are found on.
        images: pictures that are counted; None for all.
        rounds: measurements of a picture's time.
    """

    data_dir: str
    network: str = "tf_efficientnet_lite0"
    run: str | None = None
    twin_run: str | None = None
    calibration_images: int = 256
    int8_images: int = 256
    images: int | None = None
    rounds: int = 50


def export_rows(settings: ExportSettings, progress: Callable[[str], object] = print) -> Iterator[Row]:
    """Export both networks in every form, a row each.

    The time is of one picture in a process of its own thread count, all forms of both networks taking turns;
    `ratio_to_twin` is over the time of the same form of batch norm's folded network, round by round.

    Raises:
        InputError: what cannot be loaded, exported or read.
    """
    networks = _networks(settings, progress)
    with TemporaryDirectory() as folder:
        forms: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
        rows: dict[tuple[str, str], Row] = {}
        for norm, model in networks.items():
            for form, found, row in _exported(settings, model, Path(folder, norm), progress):
                forms[norm, form], rows[norm, form] = found, row | _top1(settings, model, form, found, progress)
        timings = _timed(settings, networks["deconv"], forms)
    for (norm, form), row in rows.items():
        names = _names(settings, networks[norm]) | {"norm": norm, "form": form}
        yield dict.fromkeys(COLUMNS, "") | names | row | _times(timings, norm, form)


def range_rows(settings: ExportSettings, progress: Callable[[str], object] = print) -> Iterator[Row]:
    """Measure how much the ranges of channels differ in every layer of both networks' plain forms, a row each.

    `output_channels` and `input_channels` are the largest absolute weight of a channel, at its largest over its median;
    `activations` is the same of the layer's input on `int8_images` pictures; `kurtosis` of a channel's weights (3 of a
    normal distribution), at its median over the output channels.
    """
    for norm, model in _networks(settings, progress).items():
        plain = plain_form(model)
        inputs = _input_ranges(plain, picture_loader(model, settings.data_dir, images=settings.int8_images))
        for name, layer in plain.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and name in inputs:
                yield {
                    **_names(settings, model),
                    "norm": norm,
                    "layer": name,
                    "weights_of_layer": layer.weight.numel(),
                    "output_channels": _spread(layer.weight.flatten(1).abs().amax(1)),
                    "input_channels": _spread(_by_input(layer.weight)),
                    "kurtosis": _kurtosis(layer.weight.flatten(1)),
                    "activations": _spread(inputs[name]),
                    **conditions("cpu"),
                }


def _networks(settings: ExportSettings, progress: Callable[[str], object]) -> dict[str, nn.Module]:
    twin = load_network(settings.twin_run) if settings.twin_run else create_batch_norm(settings.network)
    if settings.run:
        return {"batch norm": twin, "deconv": load_network(settings.run)}
    deconv = create_transferred(settings.network)
    progress(f"calibrating on {settings.calibration_images} pictures")
    calibrate(deconv, picture_loader(deconv, settings.data_dir, images=settings.calibration_images))
    return {"batch norm": twin, "deconv": deconv}


def _names(settings: ExportSettings, model: nn.Module) -> Row:
    cfg: Any = model.pretrained_cfg
    weights = Path(settings.run).name if settings.run else "pretrained, calibrated"
    return {"network": cfg["architecture"].removesuffix("_deconv"), "weights": weights}


def _exported(
    settings: ExportSettings, model: nn.Module, folder: Path, progress: Callable[[str], object]
) -> Iterator[tuple[str, Callable[[Tensor], Tensor], Row]]:
    """Yield each form with what runs it and the figures of its file."""
    folder.mkdir()
    plain = plain_form(model)
    yield PYTORCH, lambda images: run(plain, images), {}
    for number, (form, options) in enumerate(FORMS.items()):
        if options["format"] == "safetensors" and not is_whitened(model):
            continue
        progress(f"{folder.name}: {form}")
        pictures = picture_loader(model, settings.data_dir, images=settings.int8_images)
        int8 = pictures if form.endswith("int8") else None
        export = export_network(model, folder / str(number), **options, int8=int8)
        row = {"megabytes": rounded(export.bytes / 1e6), "largest_difference": rounded(export.difference)}
        if export.same_class is not None:
            row |= {"same_class": rounded(100 * export.same_class), "int8_images": settings.int8_images}
        yield form, open_export(export.file, options["format"], half=options.get("half", False)), row


def _top1(
    settings: ExportSettings,
    model: nn.Module,
    form: str,
    found: Callable[[Tensor], Tensor],
    progress: Callable[[str], object],
) -> Row:
    if form not in EVALUATED:
        return {}
    progress(f"counting pictures of {form}")
    pictures = labelled_pictures(model, settings.data_dir, settings.images)
    return {"top1": rounded(top1(found, pictures)), "images": len(pictures.dataset)}


def _timed(
    settings: ExportSettings, model: nn.Module, forms: dict[tuple[str, str], Callable[[Tensor], Tensor]]
) -> Timings:
    image = next(iter(picture_loader(model, settings.data_dir, images=1)))[0]
    actions = {f"{norm}: {form}": lambda found=found: found(image) for (norm, form), found in forms.items()}
    return interleave(actions, rounds=settings.rounds, warmup=3)


def _times(timings: Timings, norm: str, form: str) -> Row:
    import onnxruntime

    spread = timings.spread(f"{norm}: {form}")
    row = {
        "milliseconds": rounded(1e3 * spread.median),
        "milliseconds_lower": rounded(1e3 * spread.lower),
        "milliseconds_upper": rounded(1e3 * spread.upper),
        "onnxruntime": onnxruntime.__version__,
        **conditions("cpu"),
    }
    twin = f"batch norm: {form}"
    if norm != "batch norm" and twin in timings.seconds:
        row["ratio_to_twin"] = rounded(timings.ratio(f"{norm}: {form}", twin).median)
    return row


def _input_ranges(plain: nn.Module, pictures: DataLoader) -> dict[str, Tensor]:
    """Return the largest absolute value of each channel of the layers' inputs, by the layers' names."""
    ranges: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].abs().transpose(0, 1).flatten(1).amax(1)
            ranges[name] = torch.maximum(ranges.get(name, largest), largest)

        return look

    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(watch(name))
    for images, _ in pictures:
        run(plain, images)
    return ranges


def _spread(ranges: Tensor) -> float:
    """Return the largest of some ranges over their median."""
    return rounded(float(ranges.max() / ranges.median().clamp(min=torch.finfo(ranges.dtype).tiny)))


def _by_input(weight: Tensor) -> Tensor:
    """Return the largest absolute weight of each input channel (of its group): (O, I, ...) -> (I,)."""
    return weight.flatten(2).abs().amax((0, 2)) if weight.ndim > 2 else weight.abs().amax(0)


def _kurtosis(rows: Tensor) -> float:
    centred = rows - rows.mean(1, keepdim=True)
    return rounded(float((centred.pow(4).mean(1) / centred.pow(2).mean(1).square()).median()))
