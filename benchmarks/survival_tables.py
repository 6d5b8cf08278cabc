"""The table of runs that were killed and resumed."""

from pathlib import Path

from .tables import Table, read_rows, runs

__all__ = ["killed_runs"]


def killed_runs(results: Path) -> Table:
    """Make the table of killed runs, by their processes, what was killed, and when."""
    rows = read_rows(results / "killing.csv")
    kinds = ("processes", "victim", "moment")
    body = []
    for group in runs(sorted(rows, key=lambda row: [row[kind] for kind in kinds]), kinds):
        processes, victim, moment = (group[0][kind] for kind in kinds)
        killed = {"1": "the process", "2": "both processes"}[processes] if victim == "all" else f"process {victim} of 2"
        repeated = max(int(row["repeated"]) for row in group)
        waited = f"{max(float(row['end_seconds']) for row in group):.1f}" if victim != "all" else ""
        identical = sum(row["identical"] == "True" for row in group)
        when = "while a state was written" if moment == "writing" else "in between"
        body.append([killed, when, str(len(group)), str(repeated), waited, f"{identical} of {len(group)}"])
    head = ["killed", "when", "runs", "repeated, at most", "the other ended within, s", "identical"]
    return Table(head, body, rows, "killing.csv", "python scripts/kill_loop.py")
