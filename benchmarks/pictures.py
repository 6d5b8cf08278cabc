"""The pictures of the docs, drawn from the rows of `hub_configs/results` and from a photograph."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from timm_deconv import Deconv2d
from timm_deconv.demo.whitening import correlations, middles, whiten_windows

from .accuracy_tables import LEVERS, RATES, RECIPE, final_rows, settings
from .cost_tables import scaling_rows
from .plots import new_figure, pareto_picture, rates_picture, save, share_picture
from .tables import Row, read_rows, select

__all__ = ["NOT_OF_ROWS", "PICTURES", "draw_all", "photograph", "whitening_picture"]

TUNED = {"twin": "batch norm", "twin freeze_bn=true": "batch norm, frozen", "paper": "paper", RECIPE: "fast"}
OVERLAPPING = ("fast deconv.roles.classifier.block=64", "fast deconv.sampling_stride=4")
"""Variants that lie on others in the picture of accuracy against time; the table has them."""
SETS = {"jpeg75": "CIFAR-10", "fashion_mnist": "Fashion-MNIST", "camvid": "CamVid"}


def draw_all(results: Path, folder: Path) -> None:
    """Draw every picture into a folder.

    Raises:
        InputError: there is no matplotlib.
    """
    for name, draw in PICTURES.items():
        draw(results, folder / name)


def whitening_picture(_: Path, path: Path) -> None:
    """Draw a photograph, its whitened windows' middles, and the windows' correlations before and after.

    The photograph is scikit-learn's `china.jpg`, by Daniel Buechele, CC BY 2.0.
    """
    image, layer = photograph(), Deconv2d(3, 1, 3, cfg={"n_iter": 15})
    windows = whiten_windows(image, layer)
    white, (before, after) = middles(windows.whitened, layer), map(correlations, windows)
    figure, panels = new_figure(4, height=1.6, width=9.0, width_ratios=[1.5, 1.5, 1, 1])
    panels[0].imshow(image.permute(1, 2, 0).numpy())
    panels[1].imshow((white / 5 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())
    for panel, matrix in zip(panels[2:], (before, after), strict=True):
        shown = panel.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        panel.hlines((8.5, 17.5), -0.5, 26.5, color="grey", lw=0.5)
        panel.vlines((8.5, 17.5), -0.5, 26.5, color="grey", lw=0.5)
    figure.colorbar(shown, ax=panels[3], ticks=[-1, 0, 1], fraction=0.05)
    names = ("photograph", "whitened", "correlations before", "and after")
    for panel, name in zip(panels, names, strict=True):
        panel.set_title(name, fontsize=9)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    save(figure, path)


def photograph() -> Tensor:
    """Read the photograph: (3, H, W), values in 0..1, at half its size."""
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg"))
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.reshape(image.height, image.width, 3).permute(2, 0, 1) / 255


def levers_picture(results: Path, path: Path) -> None:
    """Draw accuracy against the time of a step, the latest row of each variant."""
    latest = {settings(row["variant"]): row for row in read_rows(results / "study_pareto.csv")}
    titles = {settings(variant): title for variant, title in LEVERS.items() if variant not in OVERLAPPING}
    pareto_picture([{**latest[variant], "variant": variant} for variant in titles], path, titles)


def tuning_picture(results: Path, path: Path) -> None:
    """Draw accuracy of fine-tuning against the rate, a panel a data set."""
    titles = {settings(variant): title for variant, title in TUNED.items()}
    rows = [row for row in final_rows(results / "finetune.csv") if row["date"] > "2026-11-26"]
    rows = select(rows, network="mobilenetv2_100", epochs="2", variant=tuple(titles))
    found: list[dict[str, Any]] = []
    for data, name in SETS.items():
        for variant in titles:
            for rate in RATES:
                own = [row for row in select(rows, data=data, variant=variant) if float(row["lr"]) == float(rate)]
                found += [_mean({**own[0], "data": name}, own)] if own else []
    rates_picture(found, path, titles)


def _mean(row: Row, own: list[Row]) -> dict[str, Any]:
    values = [float(each["top1"] or each["miou"]) for each in own]
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    figure = "miou" if row["miou"] else "top1"
    return {**row, "figure": figure, "lr": float(row["lr"]), "value": statistics.mean(values), "deviation": deviation}


def scaling_picture(results: Path, path: Path) -> None:
    """Draw the whitening's share of a step against batch, image size and width."""
    share_picture([row for axis in ("batch", "image_size", "width") for row in scaling_rows(results, axis)], path)


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "whitening.png": whitening_picture,
    "levers.png": levers_picture,
    "finetuning.png": tuning_picture,
    "scaling.png": scaling_picture,
}
"""File name -> what draws it from the folder of rows."""

NOT_OF_ROWS = {"camvid.png", "cat.jpg", "demo.png"}
"""A photograph, and pictures that other scripts have drawn: `plot_runs.py` of runs whose curves are not among the rows,
`demo_picture.py` of the demo's page."""
