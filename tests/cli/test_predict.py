"""`predict`: real pictures by file, folder, pattern and address, and what cannot be read."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from tests.pictures import read_cifar, write_camvid
from tests.served import served
from timm_deconv.models.weights import save_network

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture
def network(tmp_path):
    """The folder of a small network for CIFAR-10 that has seen a batch of noise."""
    model = timm.create_model("resnet18_cifar_deconv", width=0.125, pretrained_cfg_overlay={"label_names": NAMES})
    model.train()(torch.randn(64, 3, 32, 32))
    save_network(model.eval(), tmp_path / "network")
    return tmp_path / "network"


@pytest.fixture
def pictures(data_dir, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in read_cifar(data_dir, 1)[:3]:
        (folder / f"{name}.jpg").write_bytes(content)
    return folder


def test_a_folder_a_pattern_and_an_address_give_the_same_classes(network, pictures, command):
    by_folder = json.loads(command("predict", network, pictures, "--json").output)
    assert [Path(each["picture"]).stem for each in by_folder] == NAMES[:3]
    named = [{row["class"] for row in each["classes"]} for each in by_folder]
    assert all(len(classes) == 5 and classes <= set(NAMES) for classes in named)
    assert json.loads(command("predict", network, f"{pictures}/*.jpg", "--json").output) == by_folder
    with served(pictures) as address:
        (answered,) = json.loads(command("predict", network, f"{address}/bird.jpg", "--json").output)
    assert answered == {"picture": f"{address}/bird.jpg", "classes": by_folder[2]["classes"]}


def test_the_network_of_the_package_knows_real_pictures(data_dir, tmp_path, command):
    truth = {}
    for index, (name, content) in enumerate(read_cifar(data_dir, 4)):
        truth[f"{tmp_path}/{index:02d}.jpg"] = name
        Path(f"{tmp_path}/{index:02d}.jpg").write_bytes(content)
    found = json.loads(command("predict", "resnet18_025_cifar_deconv", tmp_path, "--top", 1, "--json").output)
    right = [each["classes"][0]["class"] == truth[each["picture"]] for each in found]
    assert len(right) == 40 and sum(right) >= 32


def test_batch_norms_network_and_the_whitened_one_name_the_same_classes_of_imagenet(command):
    words = [Path(__file__).parents[2] / "docs" / "images" / "cat.jpg", "--top", 2, "--json"]
    twin, whitened = (
        json.loads(command("predict", name, *words).output)[0]["classes"]
        for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite0_deconv")
    )
    assert [row["class"] for row in twin] == ["Egyptian cat", "tiger cat"]
    assert whitened == [{**row, "probability": pytest.approx(row["probability"], abs=2e-4)} for row in twin]


def test_a_network_for_masks_says_shares_of_the_pixels(data_dir, tmp_path, command):
    save_network(timm.create_model("segmenter", base="test_resnet", num_classes=3), tmp_path / "masks")
    picture = next((write_camvid(data_dir, tmp_path, val=1) / "val" / "images").iterdir())
    (found,) = json.loads(command("predict", tmp_path / "masks", picture, "--json").output)
    assert sum(row["share"] for row in found["classes"]) == pytest.approx(1)


def test_the_table_has_a_line_a_class_and_pictures_are_drawn(network, pictures, command, tmp_path):
    done = command("predict", network, pictures, "--top", 2, "--draw", tmp_path / "new" / "drawn")
    head, *lines = (line.split() for line in done.output.splitlines())
    assert head == ["picture", "class", "probability"] and len(lines) == 6 and done.errors == ""
    assert all(name in NAMES and 0 <= float(share) <= 1 for _, name, share in lines)
    drawn = sorted((tmp_path / "new" / "drawn").iterdir())
    assert [file.name for file in drawn] == [f"{index:04d}-{name}.png" for index, name in enumerate(NAMES[:3])]
    for file in drawn:
        with Image.open(file) as picture:
            assert picture.height > 192 + 2 * 12


def test_drawings_are_named_by_the_path_of_an_address_and_by_what_a_file_system_takes(network, pictures, command):
    long = (pictures / "bird.jpg").rename(pictures / f"{'é' * 124}.jpg")
    with served(pictures) as address:
        places = [f"{address}/cat%20x.jpg?signature=a/b", long]
        (pictures / "airplane.jpg").rename(pictures / "cat x.jpg")
        done = command("predict", network, *places, "--draw", pictures / "drawn")
    assert (done.status, done.errors) == (0, "")
    drawn = sorted(file.name for file in (pictures / "drawn").iterdir())
    assert drawn == ["0000-cat x.png", f"0001-{'é' * 100}.png"]


def test_a_drawing_that_cannot_be_written_loses_nothing_else(network, pictures, command, tmp_path):
    (tmp_path / "drawn" / "0000-airplane.png").mkdir(parents=True)
    done = command("predict", network, pictures, "--draw", tmp_path / "drawn", "--json")
    assert [Path(each["picture"]).stem for each in json.loads(done.output)] == NAMES[:3]
    first, last = done.errors.splitlines()
    assert first.startswith(f"{pictures}/airplane.jpg: ") and "Is a directory" in first
    assert (done.status, last) == (1, "InputError: 1 of 3 pictures cannot be drawn")
    assert (tmp_path / "drawn" / "0002-bird.png").is_file()


def test_what_cannot_be_read_is_left_out_and_named(network, pictures, command):
    (pictures / "aaa.png").write_text("no picture")
    (pictures / "empty.png").touch()
    done = command("predict", network, pictures, "--json")
    assert done.status == 1 and [Path(each["picture"]).stem for each in json.loads(done.output)] == NAMES[:3]
    first, second, last = done.errors.splitlines()
    assert first.startswith(f"{pictures}/aaa.png: the file is no picture; JPEG, PNG")
    assert second == f"{pictures}/empty.png: the file is empty; choose another"
    assert last == "InputError: 2 of 5 pictures cannot be read"


def test_a_picture_that_is_named_twice_is_shown_twice(network, pictures, command):
    done = command("predict", network, pictures / "bird.jpg", pictures / "bird.jpg", "--json")
    first, second = json.loads(done.output)
    assert (done.status, done.errors) == (0, "") and first == second


def test_bad_input_is_one_line_and_status_1(network, pictures, command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").write_text("<html></html>")
    (tmp_path / "text.png").write_text("no picture")
    picture = pictures / "bird.jpg"
    with served(tmp_path) as address:
        for words, line in {
            (tmp_path / "text.png",): f"{tmp_path}/text.png: the file is no picture",
            (tmp_path / "empty",): f"no pictures in the folder {tmp_path}/empty",
            (f"{address}/page.html",): f"{address}/page.html: the address answers with a page (text/html)",
            ("http://127.0.0.1:1/cat.png",): "cat.png: cannot be had (",
            (picture, "--top", 0): "--top 0: at least one class",
            (picture, "--draw", tmp_path / "text.png"): "File exists",
            (picture, "--draw", tmp_path / "text.png" / "drawn"): "Not a directory",
        }.items():
            done = command("predict", network, *words)
            assert (done.status, done.output) == (1, "") and done.errors.count("\n") == 1, words
            assert line in done.errors, words


def test_weights_that_are_not_there_are_said_to_be_missing(pictures, command):
    done = command("predict", "densenet121_cifar_deconv", pictures)
    assert done.status == 1 and "there are no weights of densenet121_cifar_deconv" in done.errors
    assert done.errors.count("\n") == 1
