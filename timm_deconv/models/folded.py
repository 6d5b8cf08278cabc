"""Weights in two forms: with whitening, as training leaves them, and folded, as the plain network has them.

Folded weights fit a whitening network whose whiteners are the identity.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from timm_deconv.convert.fuse import fuse_in_place
from timm_deconv.convert.module_types import WHITENING_TYPES
from timm_deconv.layers import WhiteningMixin

__all__ = ["NEEDED", "STATISTICS", "fold_weights", "has_whitening", "identity_statistics", "is_folded", "same_blocks"]

NEEDED = ("running_mean", "running_deconv")
STATISTICS = (*NEEDED, "num_batches_tracked", "running_gain", "running_power")
"""Buffers of a whitening layer; it knows what is meant where older files lack one that is not needed."""

StateDict = Mapping[str, Tensor]


def has_whitening(state_dict: StateDict) -> bool:
    """Return whether the weights are of a whitening network."""
    return any(key.endswith(".running_deconv") for key in state_dict)


def is_folded(state_dict: StateDict, model: nn.Module) -> bool:
    """Return whether a whitening network lacks nothing but statistics in the weights."""
    missing = {key for key in model.state_dict().keys() - state_dict.keys() if not key.endswith(STATISTICS[2:])}
    return bool(missing) and all(key.endswith(NEEDED) for key in missing) and not has_whitening(state_dict)


def identity_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the statistics of layers that have seen nothing, by the names of the network's state dict."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, WhiteningMixin):
            continue
        buffers = {key: torch.zeros_like(value, device="cpu") for key, value in layer.named_buffers(recurse=False)}
        eye = torch.eye(layer.blocks.features, dtype=layer.running_deconv.dtype)
        buffers["running_deconv"] = eye.expand_as(layer.running_deconv).clone()
        if "running_gain" in buffers:
            buffers["running_gain"].fill_(1)
        found |= {f"{name}.{key}" if name else key: value for key, value in buffers.items()}
    return found


def same_blocks(a: nn.Module, b: nn.Module) -> bool:
    """Return whether whitening means the same in both networks: the same layers whiten the same features together."""
    kinds = [
        {
            name: (type(layer), getattr(layer, "blocks", None), layer.running_deconv.shape)
            for name, layer in network.named_modules()
            if isinstance(layer, WHITENING_TYPES)
        }
        for network in (a, b)
    ]
    return kinds[0] == kinds[1]


@torch.no_grad()
def fold_weights(state_dict: StateDict, network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the plain network that computes the same.

    Args:
        state_dict: of a whitening network.
        network: one of its settings, on the meta device; it is used up.
    """
    network.load_state_dict(dict(state_dict), strict=False, assign=True)
    fuse_in_place(network)
    return {key: value for key, value in network.state_dict().items() if not value.is_meta}
