"""The table of the zoo: what its entries are of, and what their rows say."""

import json
from pathlib import Path

from timm_deconv.errors import InputError
from timm_deconv.models.zoo import ZooEntry, read_entry

from .tables import NOTHING, Row, Table, read_rows, select

__all__ = ["zoo"]

IMAGES = {"cifar10": "CIFAR-10", "camvid": "CamVid", "digits": "digits", "imagenet": "ImageNet-1k"}
COMES = {"packaged": "with the package", "weights": "in a checkout"}


def zoo(results: Path) -> Table:
    """Make the table of the entries beside the results: weights, accuracy (mean IoU where it is one), size."""
    found = [read_entry(file.name.removesuffix(".yaml"), file) for file in sorted(results.parent.glob("*.yaml"))]
    rows = {entry.name: _row(entry, results) for entry in found if entry.results}
    body = [_line(entry, rows.get(entry.name)) for entry in found]
    files = sorted({entry.results.file for entry in found if entry.results})
    head = ["name", "images", "recipe", "accuracy in %", "parameters", "file", "it comes"]
    command = "timm-deconv train RECIPE --model NAME --data-dir DIR"
    return Table(head, body, list(rows.values()), "`, `".join(files), command)


def _row(entry: ZooEntry, results: Path) -> Row:
    assert entry.results is not None
    rows = select(read_rows(results / entry.results.file), **entry.results.row)
    if len(rows) != 1:
        raise InputError(f"{entry.name}: {len(rows)} rows of {entry.results.file} are its run's; there must be one")
    return rows[0]


def _line(entry: ZooEntry, row: Row | None) -> list[str]:
    folder, file = next(((place, entry.files[place]) for place in COMES if place in entry.files), ("", None))
    where = [COMES[folder]] if folder else []
    where += [f"from the Hub, `{entry.hf_hub_id}`"] if entry.hf_hub_id else []
    return [
        f"`{entry.name}`",
        IMAGES.get(entry.dataset, entry.dataset),
        f"`{_training(entry)}`" if entry.recipe else "carried over",
        _accuracy(entry, row),
        f"{int(row['parameters']) / 1e6:.2f} M" if row else NOTHING,
        f"{file.size / 1e6:.1f} MB" if file else NOTHING,
        ", ".join(where) or NOTHING,
    ]


def _training(entry: ZooEntry) -> str:
    """Name the recipe and the settings that differ, but for the place of the images."""
    changed = {key: value for key, value in entry.settings.items() if key != "dataset"}
    differing = (f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in changed.items())
    return " ".join([entry.recipe or "", *differing])


def _accuracy(entry: ZooEntry, row: Row | None) -> str:
    if entry.results is None or row is None:
        return NOTHING
    figure = next(name for name in entry.results.figures if name.endswith(("top1", "miou")))
    return f"{float(row[figure]):.1f}" + (" mIoU" if figure.endswith("miou") else "")
