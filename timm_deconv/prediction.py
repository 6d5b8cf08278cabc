"""What a network says of single pictures: classes with probabilities or, with masks, with their share of the pixels."""

from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from timm_deconv.convert import fuse
from timm_deconv.convert.module_types import is_whitened
from timm_deconv.data.drawing import captioned, coloured, palette
from timm_deconv.errors import InputError
from timm_deconv.models.deeplabv3 import SegmentationNet
from timm_deconv.models.labels import class_names
from timm_deconv.models.segmenter import Segmenter

__all__ = ["Prediction", "Predictor"]

DRAWN_SIZE = (512, 512)
"""Pixels that a drawn picture has at most."""


@dataclass(frozen=True)
class Prediction:
    """What a network says of one picture.

    Attributes:
        names: of the classes.
        shares: probabilities of the classes, or their shares of the pixels; (classes,), they add up to 1.
        picture: upright, in the network's channels.
        mask: class of each pixel (H, W), of networks for masks.
    """

    names: list[str]
    shares: Tensor
    picture: Image.Image
    mask: Tensor | None = None

    def top(self, number: int) -> list[tuple[str, float]]:
        """Return the first classes with their shares; of masks those that there are."""
        shares, order = self.shares.topk(min(number, len(self.names)))
        pairs = zip(order.tolist(), shares.tolist(), strict=True)
        return [(self.names[index], share) for index, share in pairs if share or self.mask is None]

    def drawn(self, number: int) -> Image.Image:
        """Draw the picture with its first classes below; classes of pixels are laid over it."""
        top = self.top(number)
        lines = [f"{name}, {share:.1%}" for name, share in top]
        picture = self.picture.copy()
        if self.mask is None:
            picture.thumbnail(DRAWN_SIZE)
            return captioned(picture, lines)
        height, width = self.mask.shape
        colours = palette(self.names)
        seen = pil_to_tensor(picture.resize((width, height)))
        shown = [colours[self.names.index(name)] for name, _ in top]
        return captioned(coloured(seen, self.mask, len(self.names), colours), lines, shown)


class Predictor:
    """A network that is ready for pictures.

    Args:
        model: of timm, for classes or for masks; a copy without whitening layers is used.

    Raises:
        InputError: it has no classifier.

    Attributes:
        channels: of its pictures, 1 or 3.
        names: of its classes.
        cfg: input size, mean and so on, as timm has them.
    """

    def __init__(self, model: nn.Module) -> None:
        if not model.num_classes:
            raise InputError("the network has no classifier, so it cannot name classes; name another one")
        self.names = class_names(model)
        self.for_masks = isinstance(model, SegmentationNet | Segmenter)
        self.cfg = timm.data.resolve_input_data_config(model, pretrained_cfg=model.pretrained_cfg)
        self.channels: int = self.cfg["input_size"][0]
        self.model = fuse(model) if is_whitened(model) else model.eval()
        self.transform = _whole(**self.cfg) if self.for_masks else timm.data.create_transform(**self.cfg)

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Prediction:
        """Look at a picture of `channels` channels."""
        logits = self.model(self.transform(picture)[None])[0].float()
        if not self.for_masks:
            return Prediction(self.names, logits.softmax(0), picture)
        mask = logits.argmax(0)
        shares = torch.bincount(mask.flatten(), minlength=len(self.names)) / mask.numel()
        return Prediction(self.names, shares, picture, mask)


def _whole(input_size: tuple[int, int, int], interpolation: str, mean: Any, std: Any, crop_pct: float, **_: Any) -> Any:
    """Make the transform of pictures for masks: nothing is cut off, the smaller side is resized as in evaluation."""
    resampling = InterpolationMode("bilinear" if interpolation == "random" else interpolation)
    side = round(min(input_size[1:]) / crop_pct)
    steps = [v2.Resize(side, resampling), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose(steps)
