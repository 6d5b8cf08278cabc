"""`timm-deconv predict`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_deconv.errors import InputError

from .output import print_json, print_table, progress

if TYPE_CHECKING:
    from timm_deconv.prediction import Prediction, Predictor

__all__ = ["predict"]


def predict(model: str, places: list[str], /, *, top: int = 5, draw: Path | None = None, json: bool = False) -> None:
    """Say what pictures show: a network's first classes, how probable they are.

    Networks for masks give the classes of the pixels, with their shares of
    the picture. What cannot be read or drawn is named on standard error and
    left out, and the exit status is 1.

        timm-deconv predict resnet18_025_cifar_deconv cat.jpg ship.png
        timm-deconv predict runs/mine 'scans/*.png' --top 1 --draw drawn
        timm-deconv predict hf-hub:ORG/NAME https://example.org/cat.jpg --json

    Args:
        model: name of a network with weights, folder of a run, or repository of the Hub (hf-hub:ORG/NAME).
        places: pictures: files, folders, patterns in quotes ('*.png', '**/*.jpg'), addresses (https://...).
        top: classes that are shown of each.
        draw: folder for the pictures with their classes below, or over the pixels.
        json: print a list of JSON.
    """
    from timm_deconv.data.pictures import file_stem, find_pictures
    from timm_deconv.models.loading import load_network
    from timm_deconv.prediction import Predictor

    if top < 1:
        raise InputError(f"--top {top}: at least one class")
    pictures = find_pictures(places)
    predictor = Predictor(load_network(model))
    if draw is not None:
        draw.mkdir(parents=True, exist_ok=True)
    found, undrawn = [], 0
    for number, picture in enumerate(progress(pictures, "pictures", len(pictures))):
        prediction = _look(predictor, picture, alone=len(pictures) == 1)
        if prediction is None:
            continue
        found.append((picture, prediction.top(top)))
        if draw is not None:
            undrawn += not _draw(prediction, top, picture, draw / f"{number:04d}-{file_stem(picture)}.png")
    figure = "share" if predictor.for_masks else "probability"
    if json:
        print_json([{"picture": picture, "classes": list(_rows(named, figure))} for picture, named in found])
    else:
        print_table([{"picture": picture, **row} for picture, named in found for row in _rows(named, figure)])
    if left_out := len(pictures) - len(found):
        raise InputError(f"{left_out} of {len(pictures)} pictures cannot be read")
    if undrawn:
        raise InputError(f"{undrawn} of {len(pictures)} pictures cannot be drawn")


def _look(predictor: "Predictor", picture: str, alone: bool) -> "Prediction | None":
    """Predict; None and a line on stderr for what cannot be read, if it is not alone."""
    from timm_deconv.data.pictures import fetch, read_picture

    try:
        return predictor(read_picture(fetch(picture), predictor.channels))
    except (InputError, OSError) as error:
        if alone:
            raise InputError(f"{picture}: {error}") from None
        print(f"{picture}: {error}", file=sys.stderr)
        return None


def _draw(prediction: "Prediction", top: int, picture: str, file: Path) -> bool:
    """Draw into a file; False and a line on stderr where it cannot be written, as what is predicted is worth more."""
    try:
        prediction.drawn(top).save(file)
        return True
    except OSError as error:
        print(f"{picture}: {error}", file=sys.stderr)
        return False


def _rows(classes: list[tuple[str, float]], figure: str) -> Iterator[dict[str, Any]]:
    for name, share in classes:
        yield {"class": name, figure: round(share, 4)}
