"""Pictures to calibrate and evaluate on, in any layout."""

import tarfile

import pytest
import timm
import torch

from tests.pictures import read_cifar, write_folders
from timm_deconv.data.evaluation import picture_loader
from timm_deconv.errors import InputError


@pytest.fixture(scope="module")
def layouts(data_dir, tmp_path_factory):
    """The same twenty pictures in folders and tars, some with others beside them in a part that is not read."""
    root = tmp_path_factory.mktemp("layouts")
    pictures = read_cifar(data_dir, 3)
    chosen, others = ([each for n, each in enumerate(pictures) if (n % 3 == 2) == odd] for odd in (False, True))
    write_folders(chosen, root / "classes")
    write_folders([("", content) for _, content in chosen], root / "flat")
    write_folders([(f"2026/{name}", content) for name, content in chosen], root / "nested")
    for part, content in (("train", chosen), ("val", others)):
        write_folders(content, root / "parts" / part)
    (root / "tars").mkdir()
    for file, source in (("flat.tar", "flat"), ("classes.tar", "classes"), ("tars/train.tar", "classes")):
        with tarfile.open(root / file, "w") as tar:
            tar.add(root / source, "")
    return root


def pictures_of(model, place, **options):
    return torch.cat([images for images, _ in picture_loader(model, place, **options)])


@pytest.mark.parametrize("layout", "flat nested parts flat.tar classes.tar tars".split())
def test_folders_and_tars_of_any_layout_give_the_same_pictures(layouts, layout):
    model = timm.create_model("resnet18_025_cifar")
    wanted, found = (pictures_of(model, str(layouts / name)) for name in ("classes", layout))
    assert found.shape == (20, 3, 32, 32)
    assert {each.numpy().tobytes() for each in found} == {each.numpy().tobytes() for each in wanted}


def test_pictures_have_the_size_and_the_channels_that_are_asked_for(layouts):
    grey = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,)}
    model = timm.create_model("resnet18_025_cifar", in_chans=1, pretrained_cfg_overlay=grey)
    assert pictures_of(model, layouts / "flat", images=5, image_size=48).shape == (5, 1, 48, 48)
    assert len(pictures_of(model, layouts / "parts", split="validation")) == 10  # else of the training part


@pytest.mark.parametrize(("place", "said"), [("nowhere", "no folder or tar of pictures "), ("", "no images in ")])
def test_a_place_without_pictures_is_named_in_one_line(tmp_path, place, said):
    with pytest.raises(InputError, match=f"^{said}{tmp_path / place}[^\n]*$") as caught:
        picture_loader(timm.create_model("resnet18_025_cifar"), tmp_path / place)
    assert "--data-dir" not in str(caught.value)
