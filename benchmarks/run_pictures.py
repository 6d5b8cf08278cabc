"""Pictures of training runs: their curves, and how memory and speed went over a long one."""

import os
from collections.abc import Sequence
from pathlib import Path

from timm_deconv.errors import InputError
from timm_deconv.training.checkpoint import read_curve

from .plots import FIGURES, new_figure, next_colours, save
from .rows import Row

__all__ = ["curves_picture", "soak_picture"]


def curves_picture(folders: Sequence[Path], path: Path) -> None:
    """Draw accuracy and training loss of runs against epochs and against seconds, evaluation included.

    Args:
        folders: of runs with an epoch at least.
        path: of the picture; its name says the format.

    Raises:
        InputError: a folder without a curve, runs of different figures, or there is no matplotlib.
    """
    curves = {name: _curve(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    headlines = {headline for headline in FIGURES for curve in curves.values() if headline in curve[0]}
    if len(headlines) != 1:
        raise InputError(f"runs of {' and of '.join(sorted(headlines))} do not go into one picture; draw two")
    (headline,) = headlines
    figure, panels = new_figure(4, rows=2, height=5.4, sharex="col", sharey="row")
    colour = next_colours()
    for name, curve in curves.items():
        own = colour(name)
        for panel, (x, y) in zip(
            panels, [(x, y) for y in (headline, "train_loss") for x in ("epoch", "seconds")], strict=True
        ):
            values = [[float(row[key]) for row in curve] for key in (x, y)]
            panel.plot(*values, "o-", color=own, label=name, markersize=3)
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(FIGURES[headline])
    panels[2].set(xlabel="epochs", ylabel="loss in training")
    panels[3].set_xlabel("seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def soak_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw memory and images a second of `soak.soak_rows` against minutes.

    Raises:
        InputError: there is no matplotlib.
    """
    figure, panels = new_figure(2, sharex=True)
    for panel, key, label in zip(panels, ("memory_mib", "images_per_second"), ("memory, MiB", "images/s"), strict=True):
        shown = [row for row in rows if row[key] != ""]
        panel.plot([float(row["minutes"]) for row in shown], [float(row[key]) for row in shown], color="#0b63ce")
        panel.set(xlabel="minutes", ylabel=label)
        panel.set_ylim(bottom=0)
    save(figure, path)


def _curve(folder: Path) -> list[dict[str, str]]:
    try:
        curve = read_curve(folder)
    except OSError:
        raise InputError(f"{folder} holds no curve.csv: no run of ours, or no epoch is finished yet") from None
    if not curve:
        raise InputError(f"{folder}/curve.csv is empty")
    return curve


def _names(folders: Sequence[Path]) -> list[str]:
    """Name runs by their paths, without what all have in common."""
    paths = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(common)) for path in paths]
