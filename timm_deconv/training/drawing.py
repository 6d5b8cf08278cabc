"""Predictions as pictures over the input."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks

__all__ = ["captioned", "coloured", "draw"]

SIDE = 192
"""Pixels of the smaller side that a captioned image has at least, so that the caption fits."""
OPACITY = 0.5
DRAWN = 100
"""Images that are drawn at most."""


class Draws(Protocol):
    """A task that draws."""

    def drawn(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Image.Image]:
        """Draw what the network says of each image over it."""


def draw(task: Draws, model: nn.Module, loader: DataLoader, folder: Path) -> int:
    """Draw the first images of a loader, DRAWN at most, as 0000.png and so on; return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    count = 0
    with torch.no_grad():
        for batch in loader:
            for picture in task.drawn(model, batch):
                if count == DRAWN:
                    return count
                picture.save(folder / f"{count:04d}.png")
                count += 1
    return count


def captioned(image: Tensor, caption: str) -> Image.Image:
    """Enlarge an image (C, H, W) of bytes where it is small, and write a line under it."""
    picture = to_pil_image(image).convert("RGB")
    factor = max(1, -(-SIDE // min(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (picture.width, picture.height + 20), "white")
    sheet.paste(picture)
    ImageDraw.Draw(sheet).text((4, picture.height + 3), caption, "black", ImageFont.load_default(12))
    return sheet


def coloured(image: Tensor, classes: Tensor, names: int, colours: Sequence[tuple[int, int, int]] | None) -> Image.Image:
    """Lay the classes (H, W) over an image (C, H, W) of bytes, in the given colours or torchvision's own."""
    masks = classes[None] == torch.arange(names, device=classes.device)[:, None, None]
    over = draw_segmentation_masks(
        image.expand(3, -1, -1), masks, alpha=OPACITY, colors=None if colours is None else list(colours)
    )
    return to_pil_image(over)
