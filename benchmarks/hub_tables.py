"""The table of published networks that were loaded: networks and versions of the Hub's client by paths of loading."""

from pathlib import Path

from .tables import NOTHING, Table, read_rows, runs

__all__ = ["loaded_by_path"]


def loaded_by_path(results: Path) -> Table:
    """Make the table of differences to the tree's own folder, relative to the largest output."""
    rows = read_rows(results / "hub_matrix.csv")
    paths = list(dict.fromkeys(row["path"] for row in rows))
    body = []
    for group in runs(sorted(rows, key=lambda row: (row["model"], row["client"])), ("model", "client")):
        found = {row["path"]: float(row["difference"]) for row in group}
        cells = [f"{found[path]:.0e}".replace("0e+00", "0") if path in found else NOTHING for path in paths]
        body.append([f"`{group[0]['model']}`", group[0]["client"], *cells])
    return Table(["network", "client", *paths], body, rows, "hub_matrix.csv", "python scripts/hub_matrix.py")
