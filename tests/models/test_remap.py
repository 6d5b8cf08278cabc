"""Weights by order: renamed where it is certain which tensor is which, refused where it is not."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor

from timm_deconv.errors import InputError
from timm_deconv.models.remap import remap_by_order

Weights = dict[str, Tensor]


def expected() -> Weights:
    return timm.create_model("test_resnet").state_dict()


def foreign(weights: Weights) -> Weights:
    """The same tensors as another code base might call them."""
    return {f"net._{name.replace('layer', 'group')}": value for name, value in weights.items()}


def test_foreign_names_in_the_networks_order_are_renamed() -> None:
    weights = expected()
    renamed = remap_by_order(foreign(weights), weights)
    assert list(renamed) == list(weights)
    assert all(renamed[name] is weights[name] for name in weights)


def swapped(weights: Weights, one: str, other: str) -> Weights:
    """The file with two of its tensors in each other's place."""
    names = list(weights)
    i, j = names.index(one), names.index(other)
    names[i], names[j] = names[j], names[i]
    return {name: weights[name] for name in names}


def truncated(weights: Weights) -> Weights:
    return dict(list(weights.items())[:-1])


def with_another(weights: Weights) -> Weights:
    return weights | {"net._ema.decay": torch.zeros(())}


def sorted_by_name(weights: Weights) -> Weights:
    return dict(sorted(weights.items()))


def of_another_shape(weights: Weights) -> Weights:
    first = next(iter(weights))
    return weights | {first: weights[first].mT.contiguous().repeat(2, 1, 1, 1)}


def of_swapped_norm(weights: Weights) -> Weights:
    return swapped(weights, "net._bn1.weight", "net._bn1.bias")


def of_other_kinds(weights: Weights) -> Weights:
    return {name.replace(".weight", ".gamma"): value for name, value in weights.items()}


def without_structure(weights: Weights) -> Weights:
    return {f"parameter{number}.weight": value for number, value in enumerate(weights.values())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated, "tensors, the network has"),
        (with_another, "tensors, the network has"),
        (sorted_by_name, "stands where the network has"),
        (of_another_shape, r"\(.*\) stands where the network has conv1.0.weight \("),
        (
            of_swapped_norm,
            "net._bn1.bias stands where the network has bn1.weight: the order",
        ),
        (of_other_kinds, "does not say which"),
        (without_structure, "does not say which"),
    ],
)
def test_what_is_not_certain_is_refused(change: Callable[[Weights], Weights], message: str) -> None:
    weights = expected()
    with pytest.raises(InputError, match=message):
        remap_by_order(change(foreign(weights)), weights)


def test_a_name_that_the_network_has_must_be_at_its_own_place() -> None:
    wanted = {f"block.{i}.weight": torch.zeros(3, 3) for i in range(3)}
    given = {"a.weight": torch.ones(3, 3), "block.0.weight": torch.ones(3, 3), "b.weight": torch.ones(3, 3)}
    with pytest.raises(InputError, match=r"block\.0\.weight stands where the network has block\.1\.weight"):
        remap_by_order(given, wanted)


def test_layers_listed_as_words_are_sorted_are_refused_though_all_shapes_are_equal() -> None:
    wanted = {f"block.{i}.weight": torch.zeros(3, 3) for i in range(12)}
    given = {f"b.{i}.weight": torch.zeros(3, 3) for i in sorted(range(12), key=str)}
    with pytest.raises(InputError, match=r"b\.11\.weight stands before b\.2\.weight"):
        remap_by_order(given, wanted)
