"""Pictures of measurements, in one style: series in words, units on the axes, panels that share an axis aligned."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_deconv.errors import InputError

from .rows import Row
from .scaling import fitted_to

__all__ = [
    "FIGURES",
    "need_matplotlib",
    "new_figure",
    "next_colours",
    "pareto_picture",
    "rates_picture",
    "save",
    "share_picture",
    "unbeaten",
]

AXES = {
    "batch": "images in a batch",
    "image_size": "height and width of an image, pixels",
    "width": "width of the network",
    "block": "channels whitened together",
}

FIGURES = {"top1": "accuracy, %", "miou": "mean IoU, %"}

WORDS = {"twin": "batch norm", "iterative": "iterative normalisation (Huang et al., 2019)"}
COLOURS = {"batch norm": "#5f6368", "paper": "#d9730d", "fast": "#0b63ce", WORDS["iterative"]: "#2e7d32"}
OTHER_COLOURS = ("#7b3fa0", "#00838f", "#b71c1c", "#827717", "#4e342e", "#c2185b")

STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 5,
    "errorbar.capsize": 3,
}

TICKS = [digit * 10**power for power in range(-1, 5) for digit in (1, 1.5, 2, 3, 5, 8)]

LEAST_SHARE = 0.1
"""Per cent of a step at which the axis of shares begins."""

MOST_BELOW = 10
"""Points of accuracy below the best under which a variant is named at the edge instead of drawn."""

Titles = Mapping[str, str]
"""A variant -> what the picture calls it; others are called by their words."""


def need_matplotlib() -> None:
    """Check that there is matplotlib to draw with.

    Raises:
        InputError: there is none.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("no matplotlib to draw with; pip install 'timm-deconv[benchmark]'") from None


def new_figure(
    panels: int, *, rows: int = 1, height: float = 3.2, width: float = 7.5, **shared: Any
) -> tuple[Any, list[Any]]:
    """Return a figure of panels side by side, and the panels.

    Args:
        panels: how many.
        rows: into which they go, one after the other.
        height, width: in inches, of the whole.
        shared: `sharex`, `sharey` of matplotlib.

    Raises:
        InputError: there is no matplotlib.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
        return figure, list(figure.subplots(rows, panels // rows, squeeze=False, **shared).flat)


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file, whose name says the format; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def share_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the whitening's share of a step against each axis of `scaling.scaling_rows`, logarithmic, with quartiles.

    Shares that are not positive are left out.

    Raises:
        InputError: there is no matplotlib.
    """
    axes_drawn = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = new_figure(len(axes_drawn), width=max(4.0, 2.8 * len(axes_drawn)), sharey=True)
    for panel, axis in zip(panels, axes_drawn, strict=True):
        _draw_shares(panel, axis, [row for row in rows if row["axis"] == axis])
    panels[0].set_ylabel("added by whitening, % of a step")
    save(figure, path)


def _draw_shares(panel: Any, axis: str, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if float(row["share"]) > 0]
    panel.set(xscale="log", yscale="log", xlabel=AXES[axis])
    if not shown:
        return
    values = [float(row[axis]) for row in shown]
    shares, lower, upper = ([100 * float(row[key]) for row in shown] for key in ("share", "share_lower", "share_upper"))
    below = [share - max(low, 1e-3 * share) for share, low in zip(shares, lower, strict=True)]
    above = [high - share for share, high in zip(shares, upper, strict=True)]
    exponent = rows[0]["exponent"]
    label = "" if exponent == "" else f"({fitted_to(axis)})^{float(exponent):.2g}"
    panel.errorbar(values, shares, yerr=(below, above), fmt="o-", label=label, color=COLOURS["fast"])
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.xaxis.minorticks_off()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_ylim(bottom=LEAST_SHARE)
    if label:
        panel.legend()


def pareto_picture(rows: Sequence[Row], path: Path, titles: Titles | None = None) -> None:
    """Draw accuracy of `study.pareto_rows` against the time of a training step, with the deviation over seeds.

    The dotted line joins what nothing else beats in both. Each point is named beside it.

    Raises:
        InputError: there is no matplotlib.
    """
    figure, (panel,) = new_figure(1, height=3.6)
    panel.set(xscale="log", xlabel="time of a training step, ms", ylabel="accuracy, %")
    colour, markers = next_colours(), itertools.cycle("os^vDPX")
    best = max(float(row["top1"]) for row in rows)
    far = [row for row in rows if float(row["top1"]) < best - MOST_BELOW]
    for row in rows:
        name = _words(row["variant"], titles)
        x, y, deviation = 1e3 * float(row["seconds"]), float(row["top1"]), float(row["top1_deviation"] or 0)
        if row not in far:
            panel.errorbar(x, y, deviation, fmt=next(markers), color=colour(name), label=name)
    front = [row for row in unbeaten(rows) if row not in far]
    times = [1e3 * float(row["seconds"]) for row in front]
    panel.plot(times, [float(row["top1"]) for row in front], ":", color="grey", zorder=0)
    below = [
        f"below: {_words(row['variant'], titles)}, {float(row['top1']):.1f} % at {1e3 * float(row['seconds']):.0f} ms"
        for row in far
    ]
    panel.text(0.01, 0.02, "\n".join(below), transform=panel.transAxes, fontsize=8)
    low, high = panel.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.xaxis.minorticks_off()
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save(figure, path)


def rates_picture(rows: Sequence[Row], path: Path, titles: Titles | None = None) -> None:
    """Draw figures of `study.rate_rows` against the rate, a panel for each kind of run and a line a variant.

    Raises:
        InputError: there is no matplotlib.
    """
    kinds = "network width data recipe epochs opt amp figure".split()
    found = list(dict.fromkeys(tuple(row[kind] for kind in kinds) for row in rows))
    figure, panels = new_figure(len(found), width=max(4.0, 2.6 * len(found)), height=3.4, sharex=True)
    colour = next_colours()
    for panel, kind in zip(panels, found, strict=True):
        shown = [row for row in rows if tuple(row[key] for key in kinds) == kind]
        top = max(row["value"] for row in rows if row["figure"] == kind[-1])
        panel.set(xscale="log", xlabel="learning rate", ylabel=FIGURES[kind[-1]], ylim=(0, 1.1 * top))
        panel.set_title(f"{kind[2]}, {kind[0]}", fontsize=9)
        panel.xaxis.set_major_formatter("{x:g}")
        for name in dict.fromkeys(row["variant"] for row in rows):
            line = sorted((row for row in shown if row["variant"] == name), key=lambda row: row["lr"])
            x, y, deviation = ([row[key] or 0 for row in line] for key in ("lr", "value", "deviation"))
            title = _words(name, titles)
            panel.errorbar(x, y, yerr=deviation, fmt="o-", label=title, color=colour(title))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def unbeaten(rows: Sequence[Row]) -> list[Row]:
    """Return the rows than which no faster one is as accurate, fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (float(row["seconds"]), -float(row["top1"]))):
        if not front or float(row["top1"]) > float(front[-1]["top1"]):
            front.append(row)
    return front


def _words(variant: str, titles: Titles | None) -> str:
    """A variant as pictures call it: `fast deconv.roles.stem.n_iter=2` is "fast, stem n_iter 2" if it has no title."""
    if titles and variant in titles:
        return titles[variant].replace("`", "")
    first, *settings = variant.split()
    short = [word.removeprefix("deconv.").removeprefix("roles.") for word in settings]
    return ", ".join([WORDS.get(first, first), *(re.sub(r"[._=]", " ", word) for word in short)])


def next_colours() -> Callable[[str], str]:
    """Colours by name of a series: presets and peers have their own, others the next one."""
    given = dict(COLOURS)
    others = itertools.cycle(OTHER_COLOURS)
    return lambda name: given.setdefault(name, next(others)) if name not in given else given[name]
