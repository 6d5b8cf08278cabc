"""A real ImageNet network on real photographs: the same network after it was transferred, calibrated and fused."""

import csv
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
import timm
from PIL import Image

from benchmarks import transfer
from benchmarks.transfer import TransferSettings, transfer_rows
from timm_deconv.errors import InputError

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


def photographs(data_dir: Path, folder: Path, images: int) -> Path:
    """The first photographs of the sample, one a class, in a folder."""
    with tarfile.open(data_dir / "imagenet-sample" / "images.tar.gz") as tar:
        for member in tar:
            if member.isfile() and images:
                tar.extract(member, folder, filter="data")
                images -= 1
    return folder


@pytest.mark.slow
def test_sixty_photographs_keep_their_class(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photographs(data_dir, tmp_path / "photographs", 60)
    output = tmp_path / "rows.csv"
    arguments = ["transfer", "--data-dir", folder, "--presets", "fast", "--calibration-images", 60, "--batch", 60]
    arguments += ["--output", output]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = {row["form"]: row for row in csv.DictReader(output.read_text().splitlines())}
    assert {row["images"] for row in rows.values()} == {"60"}
    assert float(rows["batch_norm"]["top1"]) > 70
    assert rows["transferred"]["same_class"] == rows["fused"]["same_class"] == "60"
    assert rows["calibrated"]["same_class"] == "60"
    assert float(rows["transferred"]["largest_difference"]) < 1e-4
    assert float(rows["fused"]["largest_difference"]) < 1e-4
    assert float(rows["calibrated"]["largest_difference"]) < 1e-3
    for form in ("batch_norm training", "calibrated training"):  # another function, of the batch too
        assert float(rows[form]["largest_difference"]) > 0.01
    assert int(rows["calibrated training"]["same_class"]) >= int(rows["batch_norm training"]["same_class"]) - 3


def test_photographs_in_print_colours_and_with_transparency_are_converted(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photographs(data_dir, tmp_path, 3)
    files = sorted(folder.glob("*/*.jpg"))
    with Image.open(files[0]) as image:
        image.convert("CMYK").save(files[0])
    with Image.open(files[1]) as image:
        image.convert("RGBA").save(files[1].with_suffix(".png"))
    files[1].unlink()
    settings = TransferSettings(str(folder), network="test_resnet", presets=())
    monkeypatch.setattr(transfer, "create_batch_norm", lambda name, checkpoint: timm.create_model(name))
    rows = transfer_rows(settings, progress=lambda message: None)
    assert [row["images"] for row in rows] == [3, 3]


def test_folders_that_are_no_synsets_and_missing_photographs_are_refused(data_dir: Path, tmp_path: Path) -> None:
    folder = photographs(data_dir, tmp_path, 2)
    with pytest.raises(InputError, match="no photographs"):
        transfer_rows(TransferSettings(str(tmp_path / "none")))
    next(folder.glob("n*")).rename(folder / "tench")
    with pytest.raises(InputError, match=r"'tench' in .* is no synset of ImageNet-1k"):
        transfer_rows(TransferSettings(str(folder)))
