"""The formats: how a plain network is written, and how a written one is run again to be checked."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.export import Dim

from timm_deconv.errors import InputError, needs_extra
from timm_deconv.models.weights import save_network

__all__ = ["FORMATS", "Format", "check_operators", "open_onnx"]

Runner = Callable[[Tensor], Tensor]
"""Runs a written network: images -> output, in its own dtype."""

PLAIN_DOMAINS = ("", "ai.onnx")
"""Of ONNX's own operators, which every runtime knows."""

TIMM_KEYS = ("mean", "std", "interpolation", "crop_pct")
"""Fields of timm's configuration that say how images are prepared; an ONNX file holds them as its metadata, in JSON."""


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        ending: of the file's name; '' for a folder.
        write: writes a plain network as this; takes images of the example, in the wanted precision, and whether other
            batches and sizes are to be possible.
        open: makes what runs the written network.
    """

    ending: str
    write: Callable[[nn.Module, Path, Tensor, bool], object]
    open: Callable[[Path], Runner]


# safetensors


def _write_safetensors(model: nn.Module, folder: Path, images: Tensor, _dynamic: bool) -> None:
    """Write the weights, and the configuration by which timm makes the plain network again."""
    if not hasattr(model, "_model_args"):
        raise InputError(f"timm has not made this {type(model).__name__}, so cannot load it; choose another format")
    model._model_args = {**model._model_args, "fused": True}
    save_network(model, folder, half=images.dtype is torch.float16)


def _open_safetensors(folder: Path) -> Runner:
    return timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()


# ONNX


def _write_onnx(model: nn.Module, file: Path, images: Tensor, dynamic: bool) -> None:
    with needs_extra("export"):
        import onnxscript  # noqa: F401 (torch imports it late and says something else)
    with _quiet():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(dynamic),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    cfg: Any = model.pretrained_cfg
    program.model.metadata_props.update({f"timm.{key}": json.dumps(cfg[key]) for key in TIMM_KEYS if key in cfg})
    program.save(str(file))


def open_onnx(file: Path) -> Runner:
    """Make a function that runs an ONNX file's network in onnxruntime, on the processor, with PyTorch's threads."""
    with needs_extra("export"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda images: torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])


def _open_plain_onnx(file: Path) -> Runner:
    check_operators(file)
    return open_onnx(file)


def check_operators(file: Path) -> set[str]:
    """Return the types of an ONNX file's operators.

    Raises:
        InputError: one is none of ONNX's own, or the file has functions of its own, so that not every runtime takes it.
    """
    with needs_extra("export"):
        import onnx
    model = onnx.load(str(file), load_external_data=False)
    other = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in PLAIN_DOMAINS}
    other |= {f"{function.domain}.{function.name}" for function in model.functions}
    if other:
        raise InputError(f"the network needs operators that are not ONNX's own: {', '.join(sorted(other))}")
    return {node.op_type for node in model.graph.node}


# PyTorch's own


def _write_torch_export(model: nn.Module, file: Path, images: Tensor, dynamic: bool) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=_dynamic_shapes(dynamic))
    with file.open("wb") as opened:
        torch.export.save(program, opened)


def _open_torch_export(file: Path) -> Runner:
    with file.open("rb") as opened:
        return torch.export.load(opened).module()


def _write_torchscript(model: nn.Module, file: Path, images: Tensor, _dynamic: bool) -> None:
    with _deprecated_torchscript():
        # sizes that a trace fixes are seen when it runs on others
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.trace(model, images, check_trace=False).save(str(file))


def _open_torchscript(file: Path) -> Runner:
    with _deprecated_torchscript():
        return torch.jit.load(str(file))


@contextmanager
def _deprecated_torchscript() -> Iterator[None]:
    """Keep to ourselves that TorchScript is on its way out, which the documentation says, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep loggers of ONNX's translation quiet that tell of its steps."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _dynamic_shapes(dynamic: bool) -> tuple[dict[int, Any]] | None:
    return ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},) if dynamic else None


FORMATS = {
    "safetensors": Format("", _write_safetensors, _open_safetensors),
    "onnx": Format(".onnx", _write_onnx, _open_plain_onnx),
    "torch-export": Format(".pt2", _write_torch_export, _open_torch_export),
    "torchscript": Format(".ts", _write_torchscript, _open_torchscript),
}
