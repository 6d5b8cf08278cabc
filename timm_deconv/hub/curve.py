"""The picture of a training run: accuracy and loss, epoch by epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_deconv.errors import needs_extra

__all__ = ["draw_curve"]

AXES = {"top1": "accuracy, %", "miou": "mean IoU, %"}
STYLE = {"font.size": 9, "axes.grid": True, "grid.color": "#dddddd", "axes.spines.top": False, "legend.frameon": False}


def draw_curve(curve: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw the figure in training and in evaluation, and the loss in training, against epochs.

    Args:
        curve: rows of a run's curve.csv, one at least.
        path: of the picture.

    Raises:
        InputError: there is no matplotlib.
    """
    with needs_extra("publish"):
        import matplotlib
        from matplotlib.figure import Figure
    figure_key = next(key for key in AXES if key in curve[0])
    epochs = [int(row["epoch"]) for row in curve]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 2.8), dpi=120, layout="constrained")
        accuracy, loss = figure.subplots(1, 2, sharex=True)
        for key, label in ((figure_key, "evaluation"), (f"train_{figure_key}", "training")):
            accuracy.plot(epochs, [float(row[key]) for row in curve], "o-", markersize=3, label=label)
        loss.plot(epochs, [float(row["train_loss"]) for row in curve], "o-", markersize=3, color="C1")
        accuracy.set(xlabel="epochs", ylabel=AXES[figure_key])
        loss.set(xlabel="epochs", ylabel="loss in training")
        accuracy.xaxis.get_major_locator().set_params(integer=True)
        accuracy.legend()
    figure.savefig(path, metadata={"Software": None})
