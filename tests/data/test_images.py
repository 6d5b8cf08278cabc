"""Pictures of every kind among the good ones are converted; files that are none are left out, or stop the run."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import read_photographs, write_folders
from timm_deconv.data import NO_CLASS, Unreadable, create_dataset, create_loader, create_transform
from timm_deconv.data.images import as_mode

TRANSFORMS = [create_transform((3, 32, 32), augmentation=kind) for kind in ("none", "rrc", "pad_crop")]


@pytest.fixture(scope="module")
def photographs(data_dir):
    return read_photographs(data_dir, 8)


@pytest.fixture(scope="module")
def photograph(photographs):
    with Image.open(io.BytesIO(photographs[0][1])) as image:
        return image.convert("RGB").resize((60, 40))


def kinds(photograph):
    grey = photograph.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = photograph.quantize(64)
    palette.info["transparency"] = bytes(range(64))
    return {
        "grey": grey,
        "deep": deep,
        "1": photograph.convert("1"),
        "rgba": photograph.convert("RGBA"),
        "la": grey.convert("LA"),
        "cmyk": photograph.convert("CMYK"),
        "palette": palette,
        "ycbcr": photograph.convert("YCbCr"),
        "point": photograph.resize((1, 1)),
    }


def saved(image, kind):
    """What a file of the picture gives back."""
    file = io.BytesIO()
    image.save(
        file,
        "tiff" if kind in ("cmyk", "ycbcr") else "png",
        **({"transparency": image.info["transparency"]} if kind == "palette" else {}),
    )
    return Image.open(file)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_of_every_kind_look_as_the_photograph_does(photograph, mode):
    expected = np.asarray(photograph.convert(mode)).astype(float)
    grey = np.asarray(photograph.convert("L").convert(mode)).astype(float)
    for kind, image in kinds(photograph).items():
        found = np.asarray(as_mode(saved(image, kind), mode)).astype(float)
        if kind == "point":
            assert found.shape[:2] == (1, 1)
        elif kind == "1":  # black and white points
            assert abs(found.mean() - grey.mean()) < 3
        else:
            apart = np.abs(found - (grey if kind in ("grey", "deep", "la") else expected)).mean()
            assert apart < (12 if kind in ("palette", "ycbcr", "cmyk") else 0.01), kind


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_takes_pictures_of_every_kind(photograph, transform):
    for kind, image in kinds(photograph).items():
        pixels = transform(saved(image, kind))
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8, kind


@pytest.fixture
def spoiled(photographs, tmp_path):
    """Eight photographs, of which the third is cut off and the fourth and fifth are empty."""
    contents = {2: lambda content: content[:400], 3: lambda _: b"", 4: lambda _: b""}
    files = [(name, contents.get(index, bytes)(content)) for index, (name, content) in enumerate(photographs)]
    write_folders(files, tmp_path / "train")
    return tmp_path


def labels(folder, limit, workers=0, replaced=True, epochs=1):
    dataset = create_dataset("", str(folder), "train")
    dataset.unreadable = Unreadable(limit, replaced=replaced)
    loader = create_loader(dataset, TRANSFORMS[0], batch_size=4, training=False, workers=workers)
    return [label for _ in range(epochs) for _, batch in loader for label in batch.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_counted_once_and_replaced_in_training(spoiled, capfd, workers):
    assert labels(spoiled, 3, workers, epochs=2) == [0, 1, 5, 5, 5, 5, 6, 7] * 2
    told = capfd.readouterr().err
    assert [told.count(f"({count} of at most 3)") for count in (1, 2, 3)] == [1, 1, 1]
    assert all(told.count(f"000{index}.jpg (index {index}): ") == 1 for index in (2, 3, 4))


def test_in_evaluation_they_do_not_count(spoiled):
    assert labels(spoiled, 3, replaced=False) == [0, 1, NO_CLASS, NO_CLASS, NO_CLASS, 5, 6, 7]


@pytest.mark.parametrize("workers", [0, 1])
def test_one_more_than_may_be_left_out_stops_the_run(spoiled, workers):
    with pytest.raises(
        OSError, match=r"unreadable image .*0004.jpg \(index 4\): .*; 2 were left out before, as many as"
    ):
        labels(spoiled, 2, workers)
    with pytest.raises(
        OSError, match=r"0002.jpg \(index 2\): .*; replace or remove it, or leave out so many by max_un"
    ):
        labels(spoiled, 0, workers)


def test_a_folder_without_a_readable_image_stops_the_run(tmp_path):
    write_folders([("a", b""), ("b", b"")], tmp_path / "train")
    with pytest.raises(OSError, match="none of 2 images can be read"):
        labels(tmp_path, 5)
