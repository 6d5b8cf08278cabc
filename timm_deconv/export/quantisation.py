"""Eight bits: onnxruntime's static quantisation of a float ONNX file, its ranges found on real pictures.

Weights get a scale for each output channel, activations one for each tensor. The scales stand in the graph (QDQ form)
as operators of ONNX's own, so that every runtime can run it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from timm_deconv.convert.statistics import images_of
from timm_deconv.errors import InputError, needs_extra

from .formats import check_operators, open_onnx
from .plain import largest_difference

__all__ = ["agreement", "quantise"]


def quantise(source: Path, file: Path, pictures: Iterable[Any]) -> None:
    """Write a float ONNX file's network in eight bits.

    Args:
        source: the float file, which takes one image at least.
        file: to be written.
        pictures: batches of images (N, C, H, W) as the network wants them, or (images, targets); some hundreds of
            images are enough.

    Raises:
        InputError: there is no picture.
    """
    with needs_extra("export"):
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = _one_by_one(pictures)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image.numpy()}

    with TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            file,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    check_operators(file)


def agreement(file: Path, source: Path, pictures: Iterable[Any]) -> tuple[float, float]:
    """Compare two ONNX files on pictures.

    Returns:
        The largest difference of an output of `file`, as `largest_difference` has it, and the share of the pictures, or
        of their pixels, that are given the same class.
    """
    images = list(_one_by_one(pictures))
    found, expected = (torch.cat(list(map(open_onnx(each), images))) for each in (file, source))
    same = (found.argmax(1) == expected.argmax(1)).double().mean()
    return largest_difference(found, expected), float(same)


def _one_by_one(pictures: Iterable[Any]) -> Iterator[Tensor]:
    """Yield images as batches of one, which a file of a fixed size takes too."""
    seen = 0
    for images in images_of(pictures, None, torch.empty(0)):
        yield from images.split(1)
        seen += len(images)
    if not seen:
        raise InputError("no pictures to find ranges on: there are none, or their iterator was used up before")
