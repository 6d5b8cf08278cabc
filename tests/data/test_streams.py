"""The same photographs as folders, tars, shards and data sets of the Hub; what streams show, and what stops them."""

import sys
import tarfile

import numpy as np
import pytest
import torch

from tests.pictures import read_photographs, write_folders, write_parquet, write_shards
from timm_deconv.data import class_names, create_dataset, create_loader, create_stream, create_transform
from timm_deconv.errors import InputError

COUNT = 12
TRANSFORM = create_transform((3, 32, 32))


@pytest.fixture(scope="module")
def photographs(data_dir):
    return read_photographs(data_dir, COUNT)


@pytest.fixture(scope="module")
def forms(photographs, tmp_path_factory):
    """A folder with the photographs in each form."""
    root = tmp_path_factory.mktemp("forms")
    write_folders(photographs, root / "folders" / "train")
    (root / "tars").mkdir()
    with tarfile.open(root / "tars" / "train.tar", "w") as tar:
        tar.add(root / "folders" / "train", "")
    write_shards(photographs, root / "shards", "train", shards=4)
    write_parquet(photographs, root / "hub", "train")
    return root


@pytest.fixture
def stream(forms):
    def create(name, split="train", training=False, num_classes=COUNT, **options):
        root = str(forms / "shards") if name == "wds/" else str(forms / "cache")
        return create_stream(name, root, split, training=training, num_classes=num_classes, **options)

    return create


def contents(loader):
    """The images of a loader by class: their mean values."""
    return {
        int(label): image.float().mean().item()
        for images, labels in loader
        for image, label in zip(images, labels, strict=True)
    }


def test_every_form_gives_the_same_photographs_and_classes(forms, stream):
    expected, hub = None, str(forms / "hub")
    ordered = [("", forms / "folders"), ("", forms / "tars"), (f"hfds/{hub}", forms / "cache")]
    datasets = [create_dataset(name, str(root), "train") for name, root in ordered]
    datasets += [stream("wds/"), stream(f"hfids/{hub}", f"train|{COUNT}")]
    for dataset in datasets:
        found = contents(create_loader(dataset, TRANSFORM, batch_size=5, training=False))
        expected = expected or found
        assert found == expected and sorted(found) == list(range(COUNT))
        assert len(dataset) == COUNT
    names = class_names(datasets[0])
    assert [class_names(dataset) for dataset in datasets] == [names, names, names, None, names]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_an_epoch_of_a_stream_shows_depends_on_seed_and_epoch(stream, workers):
    def shown(seed, epoch, consumed=0):
        dataset = stream("wds/", training=True, seed=seed)
        loader = create_loader(dataset, TRANSFORM, batch_size=3, training=True, workers=workers, seed=seed)
        loader.batch_sampler.epoch, loader.batch_sampler.consumed = epoch, consumed
        assert len(loader) == 4
        return [labels.tolist() for _, labels in loader]

    first = shown(0, 0)
    assert [len(batch) for batch in first] == [3, 3, 3, 3]
    assert shown(0, 0) == first
    assert workers or sorted(label for batch in first for label in batch) == list(range(COUNT))
    assert len({str(each) for each in (first, shown(0, 1), shown(1, 0))}) == 3
    assert len(shown(0, 0, consumed=6)) == 2, "what is left of an epoch"


def test_a_stream_of_the_hub_is_shuffled_by_epoch_and_ends_with_it(forms, stream):
    dataset = stream(f"hfids/{forms / 'hub'}", f"train|{COUNT}", training=True)
    loader = create_loader(dataset, TRANSFORM, batch_size=5, training=True)
    seen = []
    for epoch in range(2):
        loader.batch_sampler.epoch = epoch
        seen.append(torch.cat([labels for _, labels in loader]).tolist())
    assert [len(labels) for labels in seen] == [10, 10] and seen[0] != seen[1]


def test_processes_read_shards_of_their_own(stream, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    shown = []
    for process in range(2):
        monkeypatch.setattr("torch.distributed.get_rank", lambda process=process: process)
        loader = create_loader(stream("wds/", training=True), TRANSFORM, batch_size=4, training=True)
        loader.batch_sampler.process, loader.batch_sampler.processes = process, 2
        shown.append(torch.cat([labels for _, labels in loader]).tolist())
        whole = create_loader(stream("wds/"), TRANSFORM, batch_size=4, training=False)
        assert sorted(contents(whole)) == list(range(COUNT)), "evaluation is shared by who reads it"
    assert [len(labels) for labels in shown] == [6, 6] and not set(shown[0]) & set(shown[1])


def test_the_first_images_of_a_stream_can_be_chosen(stream):
    from timm_deconv.data import chosen_images

    loader = create_loader(chosen_images(stream("wds/"), 5), TRANSFORM, batch_size=2, training=False)
    assert [len(labels) for _, labels in loader] == [2, 2, 1]
    with pytest.raises(InputError, match="13 images asked for, but there are only 12"):
        chosen_images(stream("wds/"), 13)


def test_shards_may_be_named_with_their_count(stream):
    shards = stream("wds/", "train-{0000..0002}.tar|9")
    assert len(contents(create_loader(shards, TRANSFORM, batch_size=4, training=False))) == 9


def test_a_split_is_found_by_its_other_names(photographs, forms, tmp_path):
    write_shards(photographs, tmp_path, "val", shards=1)
    assert len(create_stream("wds/", str(tmp_path), "validation", training=False, num_classes=COUNT)) == COUNT
    assert len(create_dataset(f"hfds/{forms / 'hub'}", str(forms / "cache"), "training")) == COUNT


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_in_a_shard_stops_the_run_or_is_left_out(photographs, tmp_path, capfd, workers):
    cut = [(name, content[:300] if index == 5 else content) for index, (name, content) in enumerate(photographs)]
    write_shards(cut, tmp_path, "train", shards=1)
    for limit in (0, 1):
        dataset = create_stream("wds/", str(tmp_path), "train", training=False, num_classes=COUNT)
        dataset.max_unreadable = limit
        loader = create_loader(dataset, TRANSFORM, batch_size=4, training=False, workers=workers)
        if limit:
            assert len(contents(loader)) == COUNT - 1
            assert "left out: unreadable image 0005 of " in capfd.readouterr().err
        else:
            with pytest.raises(OSError, match=r"unreadable image 0005 of .*train-0000.tar: Trunc.*; 0 were left out"):
                contents(loader)


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("wds/", "trainn", {}, r"split 'trainn' of data set 'wds/' cannot be had: RuntimeError split trainn not found"),
        ("wds/", "train-{0000..0002}.tar", {}, r"nothing says how many images .* has; write .*\|COUNT"),
        ("hfids/FOLDER", "trainn|12", {}, r"split 'trainn' of data set .* cannot be had"),
        ("hfids//nowhere", "train|12", {}, r"split 'train' of data set 'hfids//nowhere' cannot be had: FileNotFound"),
        ("wds/", "train", {"num_classes": 7}, r"class \d+: the network has the classes 0 to 6; check num_classes"),
    ],
)
def test_a_stream_that_cannot_be_had_is_answered_in_one_line(forms, stream, name, split, options, message):
    with pytest.raises(InputError, match=message) as raised:
        list(stream(name.replace("FOLDER", str(forms / "hub")), split, **options))
    assert "\n" not in str(raised.value)


def test_more_processes_than_shards_are_refused_before_they_wait_for_ever(stream):
    loader = create_loader(stream("wds/", training=True), TRANSFORM, batch_size=4, training=True, workers=5)
    with pytest.raises(InputError, match="4 shards for 5 processes that load images; lower workers"):
        next(iter(loader))
    with pytest.raises(InputError, match="batch_size=13: there are only 12 training images"):
        create_loader(stream("wds/", training=True), TRANSFORM, batch_size=13, training=True)


@pytest.mark.parametrize(("package", "name", "extra"), [("webdataset", "wds/", "wds"), ("datasets", "hfids/x", "hfds")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, name, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed; pip install 'timm-deconv\[{extra}\]'"):
        create_stream(name, "/data", "train", training=True, num_classes=2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 9], r"class 9 of image 2: the network has the classes 0 to 2"),
        ([-1, -1, -1], r"class -1 of image 0: the network has the classes 0 to 2"),
        (["a", "b", "c"], r"classes such as 'a': they need to be whole numbers from 0"),
    ],
)
def test_labels_that_are_no_class_are_refused_before_training(photographs, tmp_path_factory, labels, message):
    import datasets

    from timm_deconv.data import check_labels

    columns = {"image": [{"bytes": content, "path": None} for _, content in photographs[:3]], "label": labels}
    kind = "string" if "a" in labels else "int64"
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value(kind)}
    )
    folder = tmp_path_factory.mktemp("labels")  # the Hub's library takes a folder called test... for a split
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    dataset = create_dataset(f"hfds/{folder}", str(folder / "cache"), "train")
    with pytest.raises(InputError, match=message):
        check_labels(dataset, 3)
    with pytest.raises(InputError, match=r"has no column 'fine' of classes, but image, label; set target_key"):
        create_dataset(f"hfds/{folder}", str(folder / "cache"), "train", target_key="fine")


def test_labels_of_torchvisions_data_sets_are_checked_too():
    from timm_deconv.data import Digits, check_labels

    digits = Digits(train=False)
    check_labels(digits, 10)
    with pytest.raises(InputError, match=r"class 9 of image \d+: the network has the classes 0 to 8"):
        check_labels(digits, 9)
    assert np.unique(digits.targets).size == 10
