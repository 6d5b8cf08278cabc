"""What the page is told, as values of JSON."""

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from timm_deconv.data.pictures import MOST_BYTES

from .pair import Comparison, Pair
from .whitening import correlations, has_statistics, middles

__all__ = ["about", "answer"]

SHOWN = 5
"""Classes that are shown."""
MOST_NAMED = 12
"""Classes that are listed, where there are no more."""
PREVIEW = (640, 640)
CONTRAST = 5
"""Standard deviations from black to white."""


def about(pair: Pair) -> dict[str, Any]:
    """Say what the page is to tell of the networks before there is a picture."""
    height, width = pair.stem.kernel_size
    deconv, twin = pair.names
    return {
        "deconv": deconv,
        "twin": twin,
        "carried_over": pair.carried_over,
        "class_count": len(pair.classes),
        "classes": pair.classes if len(pair.classes) <= MOST_NAMED else [],
        "most_bytes": MOST_BYTES,
        "channels": pair.channels,
        "window": [height, width],
        "steps": pair.stem.cfg.n_iter,
        "statistics": "network" if has_statistics(pair.stem) else "picture",
    }


def answer(pair: Pair, picture: Image.Image) -> dict[str, Any]:
    """Say what both networks make of a picture: pictures as addresses, probabilities, and matrices as lists of rows."""
    found = pair.compare(picture)
    preview = picture.copy()
    preview.thumbnail(PREVIEW)
    plain, whitened = (correlations(windows) for windows in found.windows)
    return {
        "picture": _as_address(preview),
        "seen": _as_address(_as_image(found.seen)),
        "whitened": _as_address(_as_image(_stretched(middles(found.windows.whitened, pair.stem)))),
        "size": list(found.seen.shape[-2:]),
        "before": _rounded(plain),
        "after": _rounded(whitened),
        "left": [_mean_off_diagonal(plain), _mean_off_diagonal(whitened)],
        "classes": _likeliest(found, pair.classes),
    }


def _likeliest(found: Comparison, names: list[str]) -> list[dict[str, Any]]:
    """Return the classes that stand first with either network, by the greater of their probabilities.

    Of ImageNet's names, which list synonyms, the first is taken.
    """
    shares = torch.stack([found.deconv, found.twin])
    ranks, greatest = (-shares).argsort().argsort().amin(0), shares.amax(0)
    chosen = sorted(range(len(names)), key=lambda index: (int(ranks[index]), -float(greatest[index])))[:SHOWN]
    return [
        {"name": names[index].partition(",")[0], "deconv": float(found.deconv[index]), "twin": float(found.twin[index])}
        for index in sorted(chosen, key=lambda index: -float(greatest[index]))
    ]


def _stretched(values: Tensor) -> Tensor:
    """Bring values (C, H, W) of any size to the range 0..1, every channel around its mean."""
    centred = values - values.mean((1, 2), keepdim=True)
    return centred / (CONTRAST * centred.std().clamp(min=1e-6)) + 0.5


def _as_image(values: Tensor) -> Image.Image:
    """Turn values (1 or 3, H, W), 0..1, into a picture."""
    pixels = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray((pixels if len(values) == 3 else pixels[..., 0]).numpy())


def _as_address(image: Image.Image) -> str:
    """Return a picture as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in matrix.tolist()]


def _mean_off_diagonal(matrix: Tensor) -> float:
    """Return the mean size of what stands beside the diagonal of a matrix (F, F); zero of F = 1."""
    pairs = len(matrix) * (len(matrix) - 1)
    return float((matrix.abs().sum() - matrix.diagonal().abs().sum()) / max(pairs, 1))
