"""Tables of synchronised statistics: whether processes learn the same, and what they send."""

from pathlib import Path

from .tables import Table, read_rows

__all__ = ["equivalence", "sent_bytes", "sharing_speed"]


def equivalence(results: Path) -> Table:
    """Make the table of differences between several processes and one."""
    rows = read_rows(results / "equivalence.csv")
    found = {(row["case"], row["processes"], row["dtype"]): row for row in rows}
    body = []
    for case in dict.fromkeys(row["case"] for row in rows):
        network, options = case.rsplit(" ", 1)
        cells = [f"`{network}`, `{options}`"]
        for dtype in ("float64", "float32"):
            cells += [_short(found[case, processes, dtype]["difference"]) for processes in ("2", "4")]
            cells.append(_short(max((found[case, number, dtype]["rounding"] for number in ("2", "4")), key=float)))
        body.append(cells)
    columns = ("2 processes", "4 processes", "rounding")
    head = ["network", *(f"{dtype}: {column}" for dtype in ("float64", "float32") for column in columns)]
    return Table(head, body, rows, "equivalence.csv", "python scripts/processes.py equivalence")


def sent_bytes(results: Path) -> Table:
    """Make the table of what a process hands over in a step, in two processes."""
    rows = [row for row in read_rows(results / "sharing.csv") if row["statistics"] == "synchronised"]
    names = ("statistics_bytes", "sync_batch_norm_bytes", "gradient_bytes")
    body = [[f"`{row['network']}`", *(f"{int(row[name]) / 1e6:.2f}" for name in names)] for row in rows]
    head = ["MB a step, 2 processes", "`fast`, synchronised", "its twin's SyncBatchNorm", "gradients"]
    return Table(head, body, rows, "sharing.csv", "python scripts/processes.py cost")


def sharing_speed(results: Path) -> Table:
    """Make the table of images a second in one process and in several, with the same number of threads in all."""
    rows = read_rows(results / "sharing.csv")
    body = []
    for network in dict.fromkeys(row["network"] for row in rows):
        speeds = {row["statistics"]: float(row["images_per_second"]) for row in rows if row["network"] == network}
        alone = speeds["one process"]
        shares = (f"{speeds[way]:.1f} ({speeds[way] / alone:.2f})" for way in ("local", "synchronised"))
        body.append([f"`{network}`", f"{alone:.1f}", *shares])
    head = ["images a second, 2 threads in all", "1 process", "2 processes, local", "2 processes, synchronised"]
    return Table(head, body, rows, "sharing.csv", "python scripts/processes.py cost")


def _short(value: str) -> str:
    return f"{float(value):.0e}".replace("e-0", "e-").replace("e+0", "e")
