"""`timm-deconv list`."""

from typing import Any

from .output import print_json, print_table

__all__ = ["list_networks"]


def list_networks(pattern: str = "*", /, *, pretrained: bool = False, json: bool = False) -> None:
    """List the networks of this package and the weights that there are.

    Names are those of timm.create_model; weights are named NETWORK.TAG, and
    the first tag is the default.

        timm-deconv list
        timm-deconv list '*_cifar*'
        timm-deconv list 'efficientnet*' --pretrained

    Args:
        pattern: of the networks' names, with * and ?.
        pretrained: those that have weights only, and where each is.
        json: print a list of JSON.
    """
    from timm_deconv.errors import unknown_name
    from timm_deconv.models.description import list_own, weights_of

    names = list_own(pattern)
    if not names:
        raise unknown_name("network", pattern, list_own("*"))
    weights = {name: weights_of(name) for name in names}
    if json:
        listed = [{"network": name, "weights": weights[name]} for name in names]
        print_json([each for each in listed if each["weights"]] if pretrained else listed)
    elif pretrained:
        print_table([{"network": f"{name}.{each['tag']}", **_place(each)} for name in names for each in weights[name]])
    else:
        print_table([{"network": name, "weights": _tags(weights[name])} for name in names])


def _tags(weights: list[dict[str, str]]) -> str:
    return " ".join(each["tag"] for each in weights)


def _place(weights: dict[str, str]) -> dict[str, Any]:
    return {"license": weights["license"], "from": weights["from"]}
