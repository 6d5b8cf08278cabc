"""export_network: a network into a file, which is checked against the network before it gets its name."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from timm_deconv.atomic_io import write_whole
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.errors import InputError, unknown_name

from .formats import FORMATS
from .plain import check_images, first_line, largest_difference, plain_form, run
from .quantisation import agreement, quantise

__all__ = ["Export", "check_options", "check_place", "default_name", "export_network", "open_export"]

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
"""How far outputs may be from the network's own, as a share of its largest one; the second of float16, whose numbers
have 11 bits."""

PRECISIONS = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        file: it, or the folder of safetensors.
        bytes: its size.
        difference: the largest of an output from the network's own in float32, over the largest of these, on random
            images; of int8 on the pictures that its ranges were found on.
        same_class: of int8, the share of these pictures (or of their pixels) that get the class that float32 gives
            them.
    """

    file: Path
    bytes: int
    difference: float
    same_class: float | None = None


def export_network(
    model: nn.Module,
    file: str | Path,
    format: str = "onnx",
    *,
    half: bool = False,
    dynamic: bool = False,
    int8: Iterable[Any] | None = None,
) -> Export:
    """Write a network's plain form into a file, whole or not at all.

    Args:
        model: a network with whitening or batch norm that takes images as its `pretrained_cfg` says and gives one
            tensor; unchanged.
        file: to be written, of safetensors a folder. There must be none yet, nor may it end as those of another format.
        format: `safetensors` (loads by `timm.create_model('local-dir:FOLDER', pretrained=True)`), `onnx`,
            `torch-export` or `torchscript`.
        half: weights and computation in float16, and so images and outputs; of safetensors matrices and kernels alone.
        dynamic: batches and images of any size; without, one image of the network's own size.
        int8: batches of images (N, C, H, W) as the network wants them, or (images, targets), gone through several
            times, on which ranges of values are found; ONNX is then written with weights and activations in 8 bits.

    Raises:
        InputError: an unknown format, options that do not go together, a file that is there, a network that cannot be
            written so, or one whose written form differs from it. Nothing is left on the disk.
    """
    file = Path(file)
    check_options(format, half=half, dynamic=dynamic, int8=int8 is not None)
    check_place(file, format)
    if format == "safetensors" and not is_whitened(model):
        raise InputError(
            "a batch-norm network's folded weights fit no network of timm: timm.models.save_for_hf saves it as it is,"
            " and onnx, torch-export or torchscript hold it folded"
        )
    written = _Written(model, format, half, dynamic)
    found: list[tuple[float, float | None]] = []

    def write(partial: Path) -> None:
        found.append((written.checked(partial), None) if int8 is None else written.quantised(partial, int8))

    write_whole(file, write)
    size = sum(each.stat().st_size for each in (file.iterdir() if file.is_dir() else [file]))
    return Export(file, size, *found[0])


def open_export(file: Path, format: str, *, half: bool = False) -> Callable[[Tensor], Tensor]:
    """Make a function that runs a written network, of float32 images and outputs.

    Args:
        file: what `export_network` wrote.
        format, half: as it was written.
    """
    written, dtype = FORMATS[format].open(file), _dtype(format, half)
    return lambda images: run(written, images.to(dtype))


def default_name(model: nn.Module, format: str, *, half: bool = False, int8: bool = False) -> str:
    """Return a name for the file: the network's and its weights' tag, how many bits where not 32, and the ending."""
    cfg: Any = model.pretrained_cfg
    name = ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))
    return f"{name}{'_int8' if int8 else '_half' if half else ''}{FORMATS[format].ending}"


def _dtype(format: str, half: bool) -> torch.dtype:
    """Return the precision in which a written network computes."""
    return PRECISIONS[half and format != "safetensors"]


class _Written:
    """A network in the form in which it is written, and what it should give on some images.

    Args:
        model, format, half, dynamic: as in `export_network`.
    """

    def __init__(self, model: nn.Module, format: str, half: bool, dynamic: bool) -> None:
        self.format, self.half, self.dynamic = format, half, dynamic
        self.plain = plain_form(model)
        self.images = check_images(self.plain, dynamic)
        itself = copy.deepcopy(model).eval()
        self.wanted = [run(itself, images) for images in self.images]
        self.plain.to(_dtype(format, half))

    def checked(self, file: Path) -> float:
        """Write a file, run it and return by how much its outputs differ.

        Raises:
            InputError: it cannot be written or run, or differs by too much.
        """
        how, tolerance = FORMATS[self.format], HALF_TOLERANCE if self.half else TOLERANCE
        with self._refused():
            how.write(self.plain, file, self.images[-1].to(PRECISIONS[self.half]), self.dynamic)
            written = open_export(file, self.format, half=self.half)
            given = [written(images) for images in self.images]
        difference = max(map(largest_difference, given, self.wanted))
        if difference > tolerance:
            raise InputError(
                f"refused: written as {self.format}{' in float16' if self.half else ''} the network gives other values"
                f" (by {difference:.2g} of the largest; {tolerance:g} is allowed); choose another format"
                f"{', or leave out half' if self.half else ''}"
            )
        return difference

    def quantised(self, file: Path, pictures: Iterable[Any]) -> tuple[float, float]:
        """Write an ONNX file in eight bits; return what `agreement` finds.

        Raises:
            InputError: as `checked`; or no picture.
        """
        with TemporaryDirectory() as folder:
            source = Path(folder, "float.onnx")
            self.checked(source)
            with self._refused():
                quantise(source, file, pictures)
            return agreement(file, source, pictures)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """Turn what PyTorch and the formats say of a network that they cannot hold into one line."""
        try:
            yield
        except (InputError, OSError):
            raise
        except Exception as error:  # each exporter has errors of its own
            name, why = type(self.plain).__name__, first_line(error.__cause__ or error)
            hint = "leave out dynamic, or choose another format" if self.dynamic else "choose another format"
            raise InputError(f"{name} cannot be written as {self.format} ({why}); {hint}") from error


def check_place(file: Path, format: str) -> None:
    """Check that a file of a format can be made at a place.

    Raises:
        InputError: there is one, no folder to hold it, or its name ends as those of another format.
    """
    ending = file.suffix.lower()
    meant = next((name for name, each in FORMATS.items() if ending and each.ending == ending), format)
    if meant != format:
        raise InputError(f"{file} ends as {meant} does, but would hold {format}: give --format {meant}, or a new name")
    if file.exists():
        raise InputError(f"{file} is there already; remove it, or give another output")
    if not file.parent.is_dir():
        raise InputError(f"no folder {file.parent} for the output; make it first")


def check_options(format: str, *, half: bool = False, dynamic: bool = False, int8: bool = False) -> None:
    """Check that the options of `export_network` are known and go together.

    Raises:
        InputError: they do not.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if int8 and format != "onnx":
        raise InputError(f"int8 is written as onnx, not as {format}")
    if int8 and half:
        raise InputError("int8 and half exclude each other: choose one")
    if dynamic and format == "safetensors":
        raise InputError("dynamic is not for safetensors, which hold weights and no sizes; leave it out")
