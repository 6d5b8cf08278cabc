"""Pictures of measurements."""

from collections.abc import Sequence
from pathlib import Path

from timm_deconv.errors import InputError

from .rows import Row

__all__ = ["need_matplotlib", "share_picture"]

LABELS = {"batch": "images a batch", "image_size": "pixels on a side", "width": "width"}


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
        label = "" if first["exponent"] == "" else f"(work)^{first['exponent']:.2g}"
        axes.errorbar(values, shares, yerr=(below, above), fmt="o-", capsize=3, label=label)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.minorticks_off()
        if label:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
