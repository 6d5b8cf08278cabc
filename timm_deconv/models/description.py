"""What a network is: its layers and how they whiten, its size and cost, and the weights that there are for it."""

import copy
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from timm.models import get_arch_pretrained_cfgs, model_entrypoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_deconv.convert.fuse import fuse_in_place
from timm_deconv.convert.head import GENERIC_NAME
from timm_deconv.convert.module_types import WHITENING_TYPES, weighted_layers
from timm_deconv.convert.roles import find_roles
from timm_deconv.errors import InputError

from .weights import DESCRIBED

__all__ = [
    "Cost",
    "Layer",
    "cost_of",
    "layers_of",
    "list_own",
    "settings_by_role",
    "taking_images",
    "weights_for",
    "weights_of",
]

BUILDERS = (GENERIC_NAME, "segmenter")
"""Registered names that make a network of any other, which is an argument of theirs."""


@dataclass(frozen=True)
class Layer:
    """A layer with a weight matrix.

    Attributes:
        name: of the module.
        role: 'stem', 'pointwise' and so on.
        kind: its class.
        shape: of the weight.
        blocks: 'blocks x features' that are whitened together; empty of plain layers.
        settings: of the whitening, where they differ from the published ones; 'none' of plain layers.
    """

    name: str
    role: str
    kind: str
    shape: str
    blocks: str
    settings: str


def layers_of(model: nn.Module) -> list[Layer]:
    """List the layers of a network that have a weight matrix, in its order."""
    roles = find_roles(model)
    return [_layer(name, module, roles[name]) for name, module in weighted_layers(model)]


def _layer(name: str, module: Any, role: str) -> Layer:
    shape = " x ".join(map(str, module.weight.shape))
    if not isinstance(module, WHITENING_TYPES):
        return Layer(name, role, type(module).__name__, shape, "", "none")
    blocks = f"{module.blocks.number} x {module.blocks.features}"
    return Layer(name, role, type(module).__name__, shape, blocks, str(module.cfg) or "as published")


def settings_by_role(layers: list[Layer]) -> Iterator[tuple[str, int, str]]:
    """Yield each role with its number of layers and their settings; a role of several settings comes several times."""
    groups: dict[tuple[str, str], int] = {}
    for layer in layers:
        groups[layer.role, layer.settings] = groups.get((layer.role, layer.settings), 0) + 1
    for (role, settings), number in groups.items():
        yield role, number, settings


@dataclass(frozen=True)
class Cost:
    """The size of a network and the work it does.

    Attributes:
        image_size: height and width of the image.
        parameters: that are trained.
        macs: multiply-accumulates of convolutions and matrix products for one image in evaluation, with whitening
            folded away.
        bytes_training: of the weights and buffers in float32, as they are trained.
        bytes_folded, bytes_half: of the network with whitening folded away, in float32 and float16.
    """

    image_size: tuple[int, int]
    parameters: int
    macs: int
    bytes_training: int
    bytes_folded: int
    bytes_half: int


def cost_of(model: nn.Module, image_size: int | None = None) -> Cost:
    """Count what a network takes.

    Args:
        model: of timm, on any device, `meta` too.
        image_size: height and width; None for those of its configuration.

    Raises:
        InputError: the network cannot take images of this size.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image size {image_size}: it is a positive number")
    channels, *size = timm.data.resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)["input_size"]
    size = [image_size, image_size] if image_size else size
    plain = copy.deepcopy(model).to("meta").eval()
    fuse_in_place(plain)
    with taking_images(size), FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.empty(1, channels, *size, device="meta"))
    numbers = [sum(value.numel() for value in each.state_dict().values()) for each in (model, plain)]
    return Cost(
        image_size=(size[0], size[1]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        bytes_training=4 * numbers[0],
        bytes_folded=4 * numbers[1],
        bytes_half=2 * numbers[1],
    )


@contextmanager
def taking_images(size: Sequence[int]) -> Iterator[None]:
    """Say in one line that a network does not take images of a size, as they are too small for its layers or too large.

    Raises:
        InputError: the body, which runs the network, met such an error.
    """
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        shape = " x ".join(map(str, size))
        raise InputError(f"images of {shape} cannot be taken ({reason}); give another image size") from error


def list_own(pattern: str) -> list[str]:
    """List the networks that this package registers, with whitening and with batch norm, whose names match.

    Names that make a network of any other are among them if they have weights, which say of which.
    """
    matching = (name for name in timm.list_models() if fnmatch(name, pattern))
    names = (name for name in matching if name not in BUILDERS or weights_of(name))
    return [name for name in names if model_entrypoint(name).__module__.startswith("timm_deconv.")]


def weights_of(architecture: str) -> list[dict[str, str]]:
    """List the weights that there are for a registered network, the default first.

    Returns:
        For each `tag`, `license` and `from`, the file or address where they are.
    """
    return [
        {"tag": cfg.tag or "", "license": cfg.license or "", "from": _origin(cfg)}
        for cfg in get_arch_pretrained_cfgs(architecture).values()
        if cfg.has_weights
    ]


def weights_for(model: Any) -> list[dict[str, str]]:
    """List weights as `weights_of` does; of a network that a folder or repository describes, those that it holds."""
    cfg = model.pretrained_cfg
    if cfg.get("source") not in ("local-dir", "hf-hub"):
        return weights_of(cfg["architecture"])
    where = [f"hf-hub:{cfg['hf_hub_id']}"] if cfg["source"] == "hf-hub" else _weights_in(Path(cfg["file"]))
    return [{"tag": cfg.get("tag") or "", "license": cfg.get("license") or "", "from": each} for each in where]


def _weights_in(folder: Path) -> list[str]:
    return [f"file {file}" for name in DESCRIBED if (file := folder / name).exists()]


def _origin(cfg: Any) -> str:
    if cfg.file:
        return f"file {Path(cfg.file).name}"
    return f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
