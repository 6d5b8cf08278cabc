"""Folders, tars and torchvision's layout; errors that name what is wrong."""

import gzip
import io
import shutil
import tarfile
from types import SimpleNamespace

import pytest
import timm
import torch

from timm_deconv.data import Digits, chosen_images, class_names, create_dataset, create_loader, create_transform
from timm_deconv.data.evaluation import picture_loader
from timm_deconv.errors import InputError

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture(scope="module")
def cifar(data_dir, tmp_path_factory):
    """Ten real CIFAR-10 images of each class a split, as tars in `tars` and as folders in `folders`."""
    root = tmp_path_factory.mktemp("cifar")
    for split in ("train", "test"):
        take_of_each_class(data_dir / "cifar10" / "jpeg75" / f"{split}.tar.gz", root / "tars" / f"{split}.tar", 10)
        with tarfile.open(root / "tars" / f"{split}.tar") as tar:
            tar.extractall(root / "folders" / split, filter="data")
    return root


def take_of_each_class(source, target, count):
    target.parent.mkdir(parents=True, exist_ok=True)
    taken = dict.fromkeys(CLASSES, 0)
    with tarfile.open(source) as packed, tarfile.open(target, "w") as tar:
        for member in packed:
            label = member.name.split("/")[-2] if member.isfile() else None
            if label in taken and taken[label] < count:
                taken[label] += 1
                tar.addfile(member, packed.extractfile(member))
            if min(taken.values()) == count:
                return


@pytest.mark.parametrize("layout", ["tars", "folders"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_data_folder_of_tars_or_folders_is_read_whatever_torchvision_calls_it(cifar, layout, split):
    dataset = create_dataset("torch/cifar10", str(cifar / layout), split)
    assert class_names(dataset) == CLASSES
    assert len(dataset) == 100
    image, label = dataset[25]
    assert image.size == (32, 32) and image.mode == "RGB" and label == 2


def test_tars_and_folders_give_the_same_images(cifar):
    tars, folders = (create_dataset("", str(cifar / layout), "train") for layout in ("tars", "folders"))
    for index in range(0, 100, 7):
        (first, label), (second, same_label) = tars[index], folders[index]
        assert first.tobytes() == second.tobytes() and label == same_label


@pytest.mark.parametrize("layout", ["tars", "folders"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run_and_is_named(cifar, tmp_path, layout, workers):
    broken = tmp_path / layout
    shutil.copytree(cifar / "folders" / "train", broken / "train")
    victim = sorted((broken / "train" / "bird").iterdir())[4]
    victim.write_bytes(victim.read_bytes()[:300])
    if layout == "tars":
        with tarfile.open(broken / "train.tar", "w") as tar:
            tar.add(broken / "train", "")
        shutil.rmtree(broken / "train")
    dataset = create_dataset("", str(broken), "train")
    loader = create_loader(dataset, create_transform((3, 32, 32)), batch_size=10, training=False, workers=workers)
    with pytest.raises(OSError, match=rf"unreadable image .*bird/{victim.name} \(index 24\): .*remove it"):
        list(loader)


def test_torchvisions_own_layout_is_read(data_dir, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (data_dir / "FashionMNIST" / "raw").glob("*.gz"):
        # the training part has to be there, and is not read
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()) if packed.stem.startswith("t10k") else b"")
    dataset = create_dataset("torch/fashion_mnist", str(tmp_path), "validation")
    assert len(dataset) == 10_000 and class_names(dataset)[9] == "Ankle boot"
    loader = create_loader(dataset, create_transform((3, 32, 32)), batch_size=8, training=False)
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.uint8 and labels[0] == 9
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", r"no data set 'digit'; nearest: digits"),
        ("torch/cifar11", r"no data set 'torch/cifar11'; nearest: torch/cifar10"),
        ("torch/cifar10", r"'torch/cifar10' needs a folder: give --data-dir"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_answered_with_advice(name, message):
    with pytest.raises(InputError, match=message):
        create_dataset(name)


def test_a_folder_without_the_split_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no data folder .*elsewhere"):
        create_dataset("", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match=r"no train folder or tar in "):
        create_dataset("", str(tmp_path))
    with pytest.raises(InputError, match=r"'torch/cifar10' not in .*dataset_download=true"):
        create_dataset("torch/cifar10", str(tmp_path))


def test_a_split_without_images_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    for split in ("train", "validation"):
        with pytest.raises(InputError, match=r"no images in .*(train|val\.tar)"):
            create_dataset("", str(tmp_path), split)


def test_fewer_training_images_than_a_batch_are_refused():
    with pytest.raises(InputError, match="batch_size=2000: there are only 1433 training images"):
        create_loader(Digits(train=True), create_transform((3, 32, 32)), batch_size=2000, training=True)


def test_padded_crops_shift_by_at_most_the_padding_and_bring_zeros():
    image, _ = Digits(train=True)[3]
    plain = create_transform((3, 32, 32))(image)
    transform = create_transform((3, 32, 32), augmentation="pad_crop", crop_padding=2, hflip=0.0)
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    windows = {padded[:, y : y + 32, x : x + 32].numpy().tobytes() for y in range(5) for x in range(5)}
    seen = {transform(image).numpy().tobytes() for _ in range(200)}
    assert seen <= windows and len(seen) > 20


def test_evaluation_crops_the_centre_of_the_resized_image():
    image, _ = Digits(train=True)[3]
    resized = create_transform((3, 40, 40))(image)
    assert torch.equal(create_transform((3, 32, 32), crop_pct=0.8)(image), resized[:, 4:36, 4:36])


@pytest.mark.parametrize("images", [0, -5])
def test_no_images_at_all_are_refused(images):
    with pytest.raises(InputError, match=f"{images} images asked for: at least one"):
        chosen_images(create_dataset("digits"), images)
    with pytest.raises(InputError, match=f"{images} images asked for: at least one"):
        picture_loader(timm.create_model("test_resnet"), "digits", images=images)


def test_classes_of_several_names_are_named_in_one_line():
    imagenet = SimpleNamespace(classes=[("tench", "Tinca tinca"), ("goldfish",)])  # as torchvision tells them
    assert class_names(imagenet) == ["tench, Tinca tinca", "goldfish"]
