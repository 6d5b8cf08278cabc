"""Networks exported by name, and what the files are worth: size, difference, pictures that are named rightly."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from timm_deconv.data.evaluation import picture_loader
from timm_deconv.errors import InputError
from timm_deconv.models.loading import load_network

from .network import check_options, check_place, default_name, export_network, open_export
from .pictures import labelled_pictures, top1
from .plain import run

__all__ = ["Request", "export_and_measure"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """How networks are to be exported.

    Attributes:
        format, half, dynamic: as in `export_network`.
        int8: folder or tar of pictures to find ranges of eight bits on; None for floats.
        int8_images: so many of them, at most.
        labelled: folder or tar of pictures in folders by class; the network and the file are evaluated on them.

    Raises:
        InputError: options that are not known or do not go together.
    """

    format: str = "onnx"
    half: bool = False
    dynamic: bool = False
    int8: Path | None = None
    int8_images: int = 256
    labelled: Path | None = None

    def __post_init__(self) -> None:
        check_options(self.format, half=self.half, dynamic=self.dynamic, int8=self.int8 is not None)
        if self.int8_images < 1:
            raise InputError(f"int8_images={self.int8_images}: one picture is needed at least")

    @property
    def form(self) -> str:
        """The format and what its numbers are."""
        return f"{self.format} {'float16' if self.half else 'int8' if self.int8 else 'float32'}"


def export_and_measure(
    request: Request, name: str, file: Path | None = None, *, twin: str | None = None
) -> tuple[Path, list[Row]]:
    """Export a network by its name.

    Args:
        request: how.
        name: a registered name, folder of a run or place of the Hub, as `load_network` takes it.
        file: to be written; by default named after the network, in the working folder.
        twin: name of a network that is exported likewise, measured, and not kept.

    Returns:
        The file, and rows of it, then of the twin's; where pictures are labelled, each behind one of the network in
        PyTorch: `network`, `form`, `MB`, `largest_difference`, `same_class` and `top1` in %, None where there is none.

    Raises:
        InputError: see `export_network`; or what cannot be loaded, or pictures that cannot be had.
    """
    if file is not None:
        check_place(file, request.format)
    model = load_network(name)
    file = file or Path(default_name(model, request.format, half=request.half, int8=request.int8 is not None))
    rows = _export(request, name, model, file)
    if twin is not None:
        with TemporaryDirectory() as folder:
            rows += _export(request, twin, load_network(twin), Path(folder, "twin"))
    return file, rows


def _export(request: Request, name: str, model: nn.Module, file: Path) -> list[Row]:
    """Export a loaded network and return its rows."""
    model.eval()
    labelled = None if request.labelled is None else labelled_pictures(model, request.labelled)
    pictures = None if request.int8 is None else picture_loader(model, request.int8, images=request.int8_images)
    options = {"format": request.format, "half": request.half, "dynamic": request.dynamic}
    export = export_network(model, file, **options, int8=pictures)
    same = None if export.same_class is None else 100 * export.same_class
    row = {"network": name, "form": request.form, "MB": export.bytes / 1e6}
    row |= {"largest_difference": export.difference, "same_class": same, "top1": None}
    if labelled is None:
        return [row]
    row["top1"] = top1(open_export(file, request.format, half=request.half), labelled)
    before = dict.fromkeys(row) | {"network": name, "form": "PyTorch float32"}
    return [before | {"top1": top1(lambda images: run(model, images), labelled)}, row]
