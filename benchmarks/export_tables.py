"""Tables of exports: what each form is worth, beside batch norm's, and how much ranges of channels differ."""

import statistics
from pathlib import Path

from .tables import NOTHING, Row, Table, numbers, read_rows, significant

__all__ = ["export_ranges", "exports"]

NORMS = ("batch norm", "deconv")


def exports(results: Path) -> Table:
    """Make the table of every form of every network, the latest row of each, with its twin's figures beside."""
    latest = {(row["network"], row["form"], row["norm"]): row for row in read_rows(results / "export.csv")}
    body, used = [], []
    for network, form, norm in latest:
        if norm != "deconv":
            continue
        twin, ours = (latest.get((network, form, each)) for each in NORMS)
        assert ours is not None
        figures = [_pair(twin, ours, "top1", 4), _pair(twin, ours, "same_class"), _pair(twin, ours, "milliseconds")]
        ratio = f"{float(ours['ratio_to_twin']):.2f}" if ours["ratio_to_twin"] else NOTHING
        body.append([f"`{network}`", form, _pair(twin, ours, "megabytes"), _difference(ours), *figures, ratio])
        used += [row for row in (twin, ours) if row is not None]
    head = ["network", "form", "MB", "largest difference", "right in %", "as in float32", "ms a picture", "ratio"]
    return Table(head, body, used, "export.csv", "python scripts/benchmark.py exports")


def export_ranges(results: Path) -> Table:
    """Make the table of ranges over the layers of each network, of both norms: median and largest."""
    layers: dict[tuple[str, str], dict[str, Row]] = {}
    for row in read_rows(results / "export_ranges.csv"):
        layers.setdefault((row["network"], row["norm"]), {})[row["layer"]] = row
    body, used = [], []
    for (network, norm), rows in layers.items():
        found = [numbers(rows.values(), column) for column in ("output_channels", "input_channels", "activations")]
        kurtosis = numbers(rows.values(), "kurtosis")
        spreads = [f"{significant(statistics.median(each))} ({significant(max(each))})" for each in found]
        body.append([f"`{network}`", norm, *spreads, f"{statistics.median(kurtosis):.1f}"])
        used += rows.values()
    head = ["network", "norm", "output channels", "input channels", "activations", "kurtosis"]
    return Table(head, body, used, "export_ranges.csv", "python scripts/benchmark.py export-ranges")


def _difference(row: Row) -> str:
    if not row["largest_difference"]:
        return NOTHING
    value = float(row["largest_difference"])
    return significant(value, 2) if value == 0 or value > 1e-3 else f"{value:.0e}"


def _pair(twin: Row | None, ours: Row, column: str, digits: int = 3) -> str:
    """Write a figure of batch norm's and of our network."""
    values = [significant(float(row[column]), digits) if row and row[column] else NOTHING for row in (twin, ours)]
    return NOTHING if set(values) == {NOTHING} else " / ".join(values)
