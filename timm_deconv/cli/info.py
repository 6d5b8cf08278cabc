"""`timm-deconv info`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .output import print_json, print_table

if TYPE_CHECKING:
    from timm_deconv.models.description import Cost

__all__ = ["info"]


def info(model: str, /, *, image_size: int | None = None, json: bool = False) -> None:
    """Describe a network: layers, whitening, parameters, work, memory, weights.

    MACs are the multiply-accumulates for one image in evaluation, where
    whitening is folded away.

        timm-deconv info resnet18_cifar_deconv
        timm-deconv info resnet50_deconv --image-size 160
        timm-deconv info segmenter.nd_camvid
        timm-deconv info runs/digits/vgg11_cifar_deconv-seed0 --json

    Args:
        model: name of the network, with a tag or the default one, folder of a run, or repository of the Hub
            (hf-hub:ORG/NAME).
        image_size: height and width of the image that is counted for; default the network's own.
        json: print JSON.
    """
    from timm_deconv.models.description import cost_of, layers_of, settings_by_role, weights_for
    from timm_deconv.models.loading import load_network

    network: Any = load_network(model, weights=False)
    architecture = network.pretrained_cfg["architecture"]
    layers, cost = layers_of(network), cost_of(network, image_size)
    roles = [
        {"role": role, "layers": number, "whitening": settings} for role, number, settings in settings_by_role(layers)
    ]
    weights = weights_for(network)
    if json:
        about = {"network": architecture, "classes": network.num_classes, **asdict(cost)}
        print_json({**about, "roles": roles, "layers": list(map(asdict, layers)), "weights": weights})
        return
    shown = "name role kind shape blocks".split()
    print_table([{key: getattr(layer, key) for key in shown} for layer in layers], architecture)
    print()
    if any(row["whitening"] != "none" for row in roles):
        print_table(roles, "Whitening by role: settings that differ from the published ones")
        print()
    print("\n".join(_lines(network.num_classes, cost)))
    print()
    if weights:
        print_table(weights, "Weights")
    else:
        print(f"No weights; timm-deconv train RECIPE --model {architecture} makes some")


def _lines(classes: int, cost: "Cost") -> list[str]:
    height, width = cost.image_size
    training, folded, half = (number / 1e6 for number in (cost.bytes_training, cost.bytes_folded, cost.bytes_half))
    kept = f"weights: {training:.1f} MB in training, {folded:.1f} MB folded, {half:.1f} MB folded in float16"
    return [
        f"{classes} classes, images of {height} x {width}",
        f"{cost.parameters:,} parameters, {cost.macs / 1e6:,.1f} million MACs an image",
        kept if training != folded else f"weights: {training:.1f} MB, {half:.1f} MB in float16",
    ]
