"""`timm-deconv export`."""

from pathlib import Path
from typing import Literal

from .output import print_json, print_table

__all__ = ["Format", "export"]

Format = Literal["safetensors", "onnx", "torch-export", "torchscript"]
"""The names in `timm_deconv.export.formats.FORMATS`, for help and completion, which wait for no import of them."""


def export(
    model: str,
    /,
    *,
    format: Format = "onnx",
    output: Path | None = None,
    half: bool = False,
    dynamic: bool = False,
    int8: Path | None = None,
    int8_images: int = 256,
    data_dir: Path | None = None,
    twin: str | None = None,
    json: bool = False,
) -> None:
    """Write a network without whitening into a file that other programs run.

    Whitening is folded away. What is written is run and compared with the
    network first; a file that differs is not kept.

        timm-deconv export runs/mine
        timm-deconv export resnet18_025_cifar_deconv --dynamic --output r18.onnx
        timm-deconv export runs/mine --format safetensors --half
        timm-deconv export runs/mine --int8 DIR --data-dir DIR --twin runs/bn

    Args:
        model: a registered name, the output folder of a run, or a repository (hf-hub:ORG/NAME).
        format: what is written; safetensors is a folder that timm loads.
        output: file, of safetensors folder, which must not be there yet; default the network's name in this folder.
        half: weights and computation in float16; safetensors hold matrices and kernels so, vectors in float32.
        dynamic: batches and images of any size, in place of one image of the network's size.
        int8: folder or tar of pictures; weights and activations get 8 bits, with ranges found on them.
        int8_images: use so many of them, always the same ones.
        data_dir: folder or tar of pictures in folders by class; tells how many the network and the file name rightly.
        twin: another network that is exported and evaluated alike, and not kept, such as that of batch norm.
        json: print a list of JSON.
    """
    from timm_deconv.export import Request, export_and_measure

    request = Request(format, half=half, dynamic=dynamic, int8=int8, int8_images=int8_images, labelled=data_dir)
    written, rows = export_and_measure(request, model, output, twin=twin)
    if json:
        print_json(rows)
    else:
        print_table(rows, title=f"{written}: written")
