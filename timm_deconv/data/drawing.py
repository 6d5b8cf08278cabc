"""Pictures with what a network says of them: a line below, or the classes of the pixels over them."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks

__all__ = ["captioned", "coloured"]

SIDE = 192
"""Pixels of the smaller side that a captioned image has at least, so that the caption fits."""
OPACITY = 0.5


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """Enlarge a picture where it is small, and write lines under it."""
    picture = picture.convert("RGB")
    factor = max(1, -(-SIDE // min(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    font = ImageFont.load_default(12)
    _, _, right, bottom = ImageDraw.Draw(picture).multiline_textbbox((4, 3), caption, font)
    sheet = Image.new("RGB", (max(picture.width, round(right) + 4), picture.height + round(bottom) + 4), "white")
    sheet.paste(picture)
    ImageDraw.Draw(sheet).multiline_text((4, picture.height + 3), caption, "black", font)
    return sheet


def coloured(image: Tensor, classes: Tensor, names: int, colours: Sequence[tuple[int, int, int]] | None) -> Image.Image:
    """Lay the classes (H, W) over an image (C, H, W) of bytes, in the given colours or torchvision's own."""
    masks = classes[None] == torch.arange(names, device=classes.device)[:, None, None]
    over = draw_segmentation_masks(
        image.expand(3, -1, -1), masks, alpha=OPACITY, colors=None if colours is None else list(colours)
    )
    return to_pil_image(over)
