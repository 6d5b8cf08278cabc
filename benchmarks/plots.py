"""Pictures of measurements."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from timm_deconv.errors import InputError

from .rows import Row
from .scaling import fitted_to

__all__ = ["need_matplotlib", "pareto_picture", "rates_picture", "share_picture"]

LABELS = {
    "batch": "images a batch",
    "image_size": "pixels on a side",
    "width": "width",
    "block": "channels whitened together",
}


def need_matplotlib() -> None:
    """Raises InputError where there is no matplotlib to draw with."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("no matplotlib to draw with; pip install 'timm-deconv[benchmark]'") from None


def share_picture(rows: Sequence[Row], path: Path) -> None:
    """The whitening share against the axis of `scaling.scaling_rows`, both logarithmic, with quartiles.

    Shares that are not positive are left out. The format is that of the path's name, e.g. .png or .svg.

    Raises:
        InputError: there is no matplotlib.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    first, shown = rows[0], [row for row in rows if row["share"] > 0]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel=LABELS[first["axis"]], ylabel="(deconv - none) / none")
    axes.set_title(f"{first['network']}, {first['preset']}, {first['hardware']}", fontsize="small")
    if shown:
        values, shares = [row[first["axis"]] for row in shown], [row["share"] for row in shown]
        below = [row["share"] - max(row["share_lower"], 1e-3 * row["share"]) for row in shown]
        above = [row["share_upper"] - row["share"] for row in shown]
        label = "" if first["exponent"] == "" else f"({fitted_to(first['axis'])})^{first['exponent']:.2g}"
        axes.errorbar(values, shares, yerr=(below, above), fmt="o-", capsize=3, label=label)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.minorticks_off()
        if label:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def pareto_picture(rows: Sequence[Row], path: Path) -> None:
    """Accuracy of `study.pareto_rows` against seconds of a training step, with the deviation over seeds.

    The line joins what nothing else beats in both.

    Raises:
        InputError: there is no matplotlib.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    first = rows[0]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="seconds a training step", ylabel="accuracy in %")
    axes.set_title(f"{first['network']} x {first['width']}, {first['recipe']}, {first['hardware']}", fontsize="small")
    for row, marker in zip(rows, itertools.cycle("os^vDP*X")):
        deviation = row["top1_deviation"] or 0
        axes.errorbar(row["seconds"], row["top1"], deviation, fmt=marker, capsize=3, label=row["variant"])
    axes.legend(fontsize="x-small", loc="center right")
    front = unbeaten(rows)
    axes.plot([row["seconds"] for row in front], [row["top1"] for row in front], ":", color="grey")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def rates_picture(rows: Sequence[Row], path: Path) -> None:
    """Figures of `study.rate_rows` against the rate, a panel for each kind of run and a line a variant.

    Raises:
        InputError: there is no matplotlib.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    kinds = "network width data recipe epochs opt amp figure".split()
    panels = sorted({tuple(row[kind] for kind in kinds) for row in rows})
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(5 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        shown = [row for row in rows if tuple(row[kind] for kind in kinds) == panel]
        network, _, data, recipe, epochs, *_, figure_name = panel
        axes.set(xscale="log", xlabel="rate", ylabel=f"{figure_name} in %")
        axes.set_title(f"{network}, {data}, {recipe}, {epochs} epochs", fontsize="small")
        for colour, name in enumerate(names):
            line = sorted((row for row in shown if row["variant"] == name), key=lambda row: row["lr"])
            deviations = [row["deviation"] or 0 for row in line]
            x, y = [row["lr"] for row in line], [row["value"] for row in line]
            axes.errorbar(x, y, yerr=deviations, fmt="o-", capsize=3, label=name, color=f"C{colour}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def unbeaten(rows: Sequence[Row]) -> list[Row]:
    """The rows than which no faster one is as accurate, fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["seconds"], -row["top1"])):
        if not front or row["top1"] > front[-1]["top1"]:
            front.append(row)
    return front
