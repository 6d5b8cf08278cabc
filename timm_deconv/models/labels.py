"""Names of a network's classes."""

from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

__all__ = ["class_names"]


def class_names(model: nn.Module) -> list[str]:
    """Return the names of a timm network's classes in order.

    They are those that its configuration tells (`label_names`, by `label_descriptions` where there are some), as of
    runs and published networks; of as many classes as an ImageNet has, its names; else class_0, class_1 and so on.
    """
    cfg: Any = model.pretrained_cfg
    number: int = model.num_classes  # type: ignore[assignment]
    named = cfg.get("label_names")
    if named and len(named) == number:
        descriptions = cfg.get("label_descriptions") or {}
        in_order = [named[key] for key in sorted(named, key=int)] if isinstance(named, dict) else named
        return [descriptions.get(name, str(name)) for name in in_order]
    if subset := infer_imagenet_subset(model):
        return list(map(ImageNetInfo(subset).index_to_description, range(number)))
    return [f"class_{index}" for index in range(number)]
