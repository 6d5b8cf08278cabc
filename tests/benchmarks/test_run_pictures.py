"""Pictures of runs show their curves, each by its name."""

import itertools
import operator
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import plots, soak
from benchmarks.run_pictures import curves_picture, soak_picture
from timm_deconv.errors import InputError
from timm_deconv.training import load_recipe
from timm_deconv.training.state_files import damage

SCRIPTS = Path(__file__).parents[2] / "scripts"


def write_curve(folder, headline="top1", factor=1.0):
    folder.mkdir(parents=True)
    lines = [f"{epoch},{3 / epoch},{50 * factor},{60 * factor + epoch},{100 * factor * epoch}" for epoch in (1, 2, 3)]
    (folder / "curve.csv").write_text("\n".join([f"epoch,train_loss,train_{headline},{headline},seconds", *lines]))
    return folder


def test_four_panels_show_accuracy_and_loss_against_epochs_and_seconds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("benchmarks.run_pictures.save", lambda figure, path: drawn.append(figure))
    folders = [write_curve(tmp_path / "runs" / name / "net-seed0", factor=f) for name, f in (("a", 1.0), ("b", 0.5))]
    curves_picture(folders, tmp_path / "runs.png")
    panels = drawn[0].axes
    lines = [[line.get_xydata().tolist() for line in panel.get_lines()] for panel in panels]
    assert lines[0] == [[[1, 61], [2, 62], [3, 63]], [[1, 31], [2, 32], [3, 33]]]
    assert lines[3] == [[[100, 3], [200, 1.5], [300, 1]], [[50, 3], [100, 1.5], [150, 1]]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a/net-seed0", "b/net-seed0"]
    assert panels[0].get_ylabel() == plots.FIGURES["top1"] and panels[3].get_xlabel() == "seconds"


def test_runs_that_cannot_be_drawn_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    first, second = write_curve(tmp_path / "a"), write_curve(tmp_path / "b", "miou")
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ([first, second], "runs of miou and of top1 do not go into one picture"),
        ([first, tmp_path / "empty"], "empty holds no curve.csv: no run of ours, or no epoch is finished yet"),
    ):
        with pytest.raises(InputError, match=message):
            curves_picture(folders, tmp_path / "runs.png")
    monkeypatch.setattr(sys, "argv", ["plot_runs.py", str(first), "--output", str(tmp_path / "one.png")])
    runpy.run_path(str(SCRIPTS / "plot_runs.py"), run_name="__main__")
    assert (tmp_path / "one.png").stat().st_size > 10_000 and "one.png" in capsys.readouterr().out


def test_a_soak_ends_by_the_clock_saves_itself_and_has_a_row_every_so_often(tmp_path, capsys):
    settings = ["model=test_resnet", "model_kwargs={}", "batch_size=128", "train_images=512", "epochs=1000"]
    recipe = load_recipe("digits", settings)
    file = tmp_path / "soak.csv"
    rows = soak.soak(recipe, tmp_path / "run", minutes=6 / 60, every=1, files=[file], cpu=True)
    times = [0.0, *(60 * row["minutes"] for row in rows)]
    spans = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(spans) > 0.9 and times[-2] < 6 <= times[-1] + 0.1 and len(rows) > 1  # a busy machine is late
    counts = [row["images"] for row in rows]
    assert counts == sorted(counts) and counts[-1] > 500 and counts[-1] % 128 == 0
    assert all(50 < row["memory_mib"] < 10_000 for row in rows)
    speeds = [row["images_per_second"] for row in rows]
    assert sum(map(operator.mul, speeds, spans)) == pytest.approx(counts[-1], rel=0.1)
    assert len(file.read_text().splitlines()) == 1 + len(rows)
    states = sorted((tmp_path / "run" / "state").glob("epoch-*"))
    assert damage(states[-1]) is None
    assert soak.soak_summary(rows).startswith("second and last quarter of 0 minutes: ")
    soak_picture(rows, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000
