"""A network with deconvolution and its twin with batch norm, which look at the same pictures."""

import textwrap
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from timm_deconv.errors import InputError
from timm_deconv.layers import Deconv2d
from timm_deconv.models.loading import load_network
from timm_deconv.models.pretrained import batch_norm_name, create_batch_norm
from timm_deconv.models.weights import TAG_PREFIX
from timm_deconv.prediction import Predictor

from .whitening import Windows, whiten_windows

__all__ = ["Comparison", "Pair", "load_pair"]


class Comparison(NamedTuple):
    """What the networks make of a picture.

    Attributes:
        deconv, twin: probabilities (classes,) of either network.
        seen: the picture as both networks get it, (C, H, W), values in 0..1.
        windows: of the first layer.
    """

    deconv: Tensor
    twin: Tensor
    seen: Tensor
    windows: Windows


class Pair:
    """Two networks that take the same input and know the same classes.

    Args:
        deconv: of timm, with a whitening convolution as its first layer.
        twin: of timm.

    Raises:
        InputError: the first has no such layer, they do not fit each other, or are for masks.

    Attributes:
        names: of both networks, with the tags of their weights.
        stem: the first layer of `deconv`.
        classes: their names.
        channels: of the pictures, 1 or 3.
        carried_over: whether the weights of `deconv` are those of a batch-norm network.
    """

    def __init__(self, deconv: nn.Module, twin: nn.Module) -> None:
        self.stem = _first_layer(deconv)
        self.names = _name(deconv), _name(twin)
        self.carried_over = _tag(deconv).startswith(TAG_PREFIX)
        self._deconv, self._twin = Predictor(deconv), Predictor(twin)
        self.classes, self.channels = self._deconv.names, self._deconv.channels
        if self._deconv.for_masks:
            raise InputError(f"{self.names[0]} is for masks; name a network for whole pictures")
        found, wanted = ((len(each.names), each.cfg["input_size"]) for each in (self._twin, self._deconv))
        if found != wanted:
            raise InputError(
                f"{self.names[1]} has {found[0]} classes and an input of {found[1]}, {self.names[0]} {wanted[0]} and"
                f" {wanted[1]}; give networks of one task"
            )

    @torch.inference_mode()
    def compare(self, picture: Image.Image) -> Comparison:
        """Let both networks look at a picture of `channels` channels."""
        image = self._deconv.transform(picture)
        mean, std = (torch.tensor(self._deconv.cfg[key])[:, None, None] for key in ("mean", "std"))
        deconv, twin = (predictor(picture).shares for predictor in (self._deconv, self._twin))
        return Comparison(deconv, twin, image * std + mean, whiten_windows(image, self.stem))


def load_pair(name: str, twin: str | None = None) -> Pair:
    """Load a deconvolution network and its twin with their weights.

    Args:
        name: of the network, as `load_network` takes it: a registered name, the folder of a run, or a Hub id.
        twin: likewise; by default the batch-norm network that the first is made from.

    Raises:
        InputError: a name or weights that cannot be had, or networks that do not fit each other.
    """
    deconv = load_network(name)
    _first_layer(deconv)
    return Pair(deconv, load_network(twin) if twin else _load_twin(deconv))


def _load_twin(deconv: nn.Module) -> nn.Module:
    name = _twin_name(deconv)
    try:
        return create_batch_norm(name)
    except (OSError, RuntimeError) as error:  # how timm and the Hub's client say that there are none
        reason = textwrap.shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        raise InputError(f"weights of the twin {name} cannot be had ({reason}); give one by --twin") from error


def _name(model: nn.Module) -> str:
    """Return a timm network's architecture and the tag of its weights."""
    cfg: Any = model.pretrained_cfg
    return ".".join(filter(None, (cfg["architecture"], _tag(model))))


def _tag(model: nn.Module) -> str:
    cfg: Any = model.pretrained_cfg
    return cfg.get("tag") or ""


def _twin_name(deconv: nn.Module) -> str:
    """Return the batch-norm network's name, with the tag of its weights if they are those that were carried over."""
    cfg: Any = deconv.pretrained_cfg
    base, tag = batch_norm_name(cfg["architecture"]), _tag(deconv)
    if base == cfg["architecture"]:
        raise InputError(f"the twin of {_name(deconv)} is not known by its name; give it by --twin")
    return f"{base}.{tag.removeprefix(TAG_PREFIX)}" if tag.startswith(TAG_PREFIX) else base


def _first_layer(model: nn.Module) -> Deconv2d:
    layer = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if not isinstance(layer, Deconv2d) or layer.groups != 1:
        raise InputError(f"the first layer of {_name(model)} does not whiten; name a network of deconvolution")
    return layer
