"""Pictures with what a network says of them: a line below, or the classes of the pixels over them."""

import colorsys
import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks

from .segmentation import KNOWN_COLOURS

__all__ = ["captioned", "coloured", "palette"]

SIDE = 192
"""Pixels of the smaller side that a captioned image has at least, so that the caption fits."""
LINE = 16
"""Pixels from line to line."""
OPACITY = 0.5

Colour = tuple[int, int, int]


def captioned(picture: Image.Image, lines: Sequence[str], colours: Sequence[Colour] = ()) -> Image.Image:
    """Enlarge a picture where it is small, and write lines under it, each behind its colour where there are some."""
    picture = picture.convert("RGB")
    factor = max(1, -(-SIDE // min(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    font, left = ImageFont.load_default(12), 4 + LINE * bool(colours)
    width = max(picture.width, *(left + math.ceil(font.getlength(line)) + 4 for line in lines))
    sheet = Image.new("RGB", (width, picture.height + LINE * len(lines) + 4), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(lines):
        top = picture.height + LINE * place + 3
        pen.text((left, top), line, "black", font)
        if colours:
            pen.rectangle((4, top + 2, LINE - 4, top + LINE - 6), colours[place])
    return sheet


def coloured(image: Tensor, classes: Tensor, names: int, colours: Sequence[Colour] | None) -> Image.Image:
    """Lay the classes (H, W) over an image (C, H, W) of bytes, in the given colours or torchvision's own."""
    masks = classes[None] == torch.arange(names, device=classes.device)[:, None, None]
    over = draw_segmentation_masks(
        image.expand(3, -1, -1), masks, alpha=OPACITY, colors=None if colours is None else list(colours)
    )
    return to_pil_image(over)


def palette(names: Sequence[str]) -> list[Colour]:
    """Return a colour for each class: its data set's where that has some, else hues in even steps."""
    known = KNOWN_COLOURS.get(tuple(names))
    if known is not None:
        return list(known)
    hues = (colorsys.hsv_to_rgb(index / len(names), 1, 0.9) for index in range(len(names)))
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in hues]
