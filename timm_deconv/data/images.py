"""Pictures of every kind as the network wants them: grey, palette, RGBA, CMYK and 16-bit ones are converted."""

import numpy as np
from PIL import Image

__all__ = ["UNREADABLE", "as_mode", "mode_of"]

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises at a file that is no picture, or only the beginning of one."""

DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of 16 bits a pixel; it converts them by cutting off what is above 255."""


def mode_of(channels: int) -> str:
    """Return Pillow's mode of images with so many channels, 1 or 3."""
    return "RGB" if channels == 3 else "L"


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert a picture to 'RGB' or 'L'; what is 16 bits deep keeps its upper eight, transparency is left out."""
    if image.mode in DEEP:
        deep = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1)
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of colours that are transparent by bytes
    return image.convert(mode)
