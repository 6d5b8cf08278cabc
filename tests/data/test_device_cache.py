"""Images kept on the device are cut and mirrored as the loader's would be, by seed, epoch and index alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from timm_deconv.data import CachedImages, Digits, as_bytes, cached_loader, create_loader, create_transform
from timm_deconv.errors import InputError

CPU = torch.device("cpu")
CROP = {"crop": (32, 32), "crop_padding": 2, "hflip": 0.5}


class Pictures(Dataset):
    """Pictures of these sizes, as often as there are sizes."""

    def __init__(self, *sizes):
        self.sizes, self.transform = sizes, None

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return self.transform(Image.new("RGB", self.sizes[index], (index, 9, 9))), index


def cached(dataset, training=True, seed=0, batch_size=32, **crop):
    return cached_loader(
        dataset, as_bytes(3), batch_size=batch_size, training=training, device=CPU, seed=seed, **(crop or CROP)
    )


def windows_of(image):
    """The places of all windows that may be cut out of a padded image, by their bytes."""
    padded = torch.nn.functional.pad(as_bytes(3)(image), (2, 2, 2, 2))
    cut = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5)}
    plain = {window.numpy().tobytes(): (*place, 0) for place, window in cut.items()}
    return plain | {window.flip(2).numpy().tobytes(): (*place, 1) for place, window in cut.items()}


def test_windows_and_mirror_images_are_as_often_as_the_loaders_own():
    """Of one image in 3,000 epochs: each of 5 x 5 places, mirrored or not, is as likely, in both ways of loading."""
    image, _ = Digits(train=True)[3]
    places, epochs = windows_of(image), 3000
    kept = cached(Digits(train=True)).dataset
    batch, labels = kept.__getitems__([(epoch, 3) for epoch in range(epochs)])
    transform = create_transform((3, 32, 32), augmentation="pad_crop", crop_padding=2, hflip=0.5)
    for images in (batch, torch.stack([transform(image) for _ in range(epochs)])):
        found = [places[each.numpy().tobytes()] for each in images]
        counts = np.array([found.count(place) for place in places.values()])
        chi_square = ((counts - epochs / 50) ** 2).sum() / (epochs / 50)
        assert chi_square < 85, "49 degrees of freedom: 85 is passed once in 900"
        tops, lefts, mirrored = np.array(found).T
        assert abs(np.corrcoef([tops, lefts, mirrored])[np.triu_indices(3, 1)]).max() < 0.07
    assert (labels == labels[0]).all()


def test_neighbours_in_index_epoch_and_seed_are_cut_independently():
    images = torch.zeros(500, 1, 40, 40, dtype=torch.uint8)
    tops = {}
    for seed in (0, 1):
        kept = CachedImages(images, torch.zeros(500, dtype=torch.long), (32, 32), 0.5, seed)
        for epoch in (0, 1):
            tops[seed, epoch] = kept.windows(np.array([(epoch, index) for index in range(500)]))[1]
    first = tops.pop((0, 0))
    for other in (*tops.values(), np.roll(first, 1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.15


def test_a_batch_depends_on_seed_epoch_and_index_and_not_on_processes():
    whole = cached(Digits(train=True))
    whole.batch_sampler.epoch = 4
    first, labels = next(iter(whole))
    shares = []
    for process in range(2):
        loader = cached(Digits(train=True))
        loader.batch_sampler.epoch, loader.batch_sampler.process, loader.batch_sampler.processes = 4, process, 2
        shares.append(next(iter(loader))[0])
    assert torch.equal(torch.cat(shares), first) and len(labels) == 32
    whole.batch_sampler.epoch = 5
    assert not torch.equal(next(iter(whole))[0], first)
    other = cached(Digits(train=True), seed=1)
    other.batch_sampler.epoch = 4
    assert not torch.equal(next(iter(other))[0], first)


def test_evaluation_and_uncut_images_are_the_loaders_own():
    transform = create_transform((3, 32, 32))
    expected = create_loader(Digits(train=False), transform, batch_size=100, training=False)
    kept = cached_loader(Digits(train=False), transform, batch_size=100, training=False, device=CPU)
    for (images, labels), (own, own_labels) in zip(expected, kept, strict=True):
        assert torch.equal(images, own) and torch.equal(labels, own_labels)
    plain = cached_loader(Digits(train=True), transform, batch_size=100, training=True, device=CPU)
    images, _ = next(iter(plain))
    by_hand = create_loader(Digits(train=True), transform, batch_size=100, training=True)
    assert torch.equal(images, next(iter(by_hand))[0])


def test_what_does_not_fit_is_refused_in_one_line(monkeypatch):
    with pytest.raises(InputError, match="keeps images of one size, and these are of several; leave cache out"):
        cached(Pictures((32, 32), (32, 30)), batch_size=2)
    with pytest.raises(InputError, match="images of 12x12 with their padding are smaller than input_size=32x32"):
        cached(Pictures((8, 8), (8, 8)), batch_size=2)
    with pytest.raises(InputError, match="batch_size=3: there are only 2 training images"):
        cached(Pictures((32, 32), (32, 32)), batch_size=3)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**20, 2**30))
    from timm_deconv.data.device_cache import _empty

    with pytest.raises(InputError, match=r"needs 0.3 GiB for 100000 images, more than half of the 0.0 GiB"):
        _empty((100_000, 3, 32, 32), torch.device("cuda"))
