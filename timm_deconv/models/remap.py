"""Weights by order: tensors by other names than the network's are renamed where their order leaves no doubt.

timm's `load_checkpoint(remap=True)` does so by order alone, which takes one tensor for another of the same shape.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from timm_deconv.errors import InputError

__all__ = ["remap_by_order"]


def remap_by_order(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names that the network has at their places.

    Every tensor must have the shape and the last part of the name (`weight`, `running_mean`) of its place, the tensors
    of a layer must be those of one layer of the network, a name that the network has must be at its own place, and
    numbers in the file's names must rise as in any listing of layers. Branches of equal shapes are trusted to be listed
    as in the network. Files that list their tensors by name, as .safetensors do, are refused: bias stands before weight
    in them.

    Args:
        state_dict: the file's tensors, in its order.
        expected: the network's, in its order; may be on the meta device.

    Raises:
        InputError: the orders differ, or may do so; the message names the first place where.
    """
    if len(state_dict) != len(expected):
        raise InputError(f"there are {len(state_dict)} tensors, the network has {len(expected)}")
    layers: dict[str, str] = {}
    places: dict[str, str] = {}
    for (name, tensor), (place, wanted) in zip(state_dict.items(), expected.items(), strict=True):
        if tensor.shape != wanted.shape:
            raise InputError(f"{name} {tuple(tensor.shape)} stands where the network has {place} {tuple(wanted.shape)}")
        (layer, _, kind), (new_layer, _, new_kind) = name.rpartition("."), place.rpartition(".")
        belongs = layers.setdefault(layer, new_layer) == new_layer and places.setdefault(new_layer, layer) == layer
        if kind != new_kind or not belongs or (name in expected and name != place):
            raise InputError(
                f"{name} stands where the network has {place}: the order of the tensors does not say which is which"
            )
    if falling := next(_falling(state_dict), None):
        raise InputError(f"{' stands before '.join(falling)}: the tensors are not in the order of the layers")
    return dict(zip(expected, state_dict.values(), strict=True))


def _falling(names: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Find pairs of names of which the earlier has the larger number, as blocks.10 before blocks.2 if sorted."""
    last: dict[str, tuple[int, str]] = {}
    for name in names:
        for number in re.finditer(r"\d+", name.rpartition(".")[0]):
            stem, value = name[: number.start()], int(number[0])
            if stem in last and last[stem][0] > value:
                yield last[stem][1], name
            last[stem] = value, name
