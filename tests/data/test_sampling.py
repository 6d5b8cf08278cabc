"""Order and augmentation of an epoch depend on seed, epoch and index alone."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from timm_deconv.data import Digits, EpochSampler, Seeded, create_loader, create_transform


def _batches(process=0, processes=1, epoch=0, consumed=0, seed=0):
    order = EpochSampler(103, 8, seed)
    order.process, order.processes, order.epoch, order.consumed = process, processes, epoch, consumed
    return list(order)


def test_an_epoch_shows_each_image_at_most_once_in_an_order_of_its_own():
    first, second, other_seed = (
        [index for batch in _batches(**place) for _, index in batch] for place in ({}, {"epoch": 1}, {"seed": 1})
    )
    assert len(first) == len(set(first)) == 96 and max(first) < 103
    assert len({tuple(first), tuple(second), tuple(other_seed)}) == 3
    assert len(EpochSampler(103, 8, 0)) == 12


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_batches_in_the_same_order(processes):
    shares = [_batches(process, processes) for process in range(processes)]
    joined = [[key for share in batch for key in share] for batch in zip(*shares, strict=True)]
    assert joined == _batches()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sampler_goes_on_from_the_samples_that_all_processes_have_consumed(processes):
    whole = _batches(processes - 1, processes, epoch=5)
    assert _batches(processes - 1, processes, epoch=5, consumed=24) == whole[3:]
    assert _batches(processes - 1, processes, epoch=5, consumed=96) == []


def _loader(workers, epoch=0, consumed=0):
    transform = create_transform((3, 32, 32), augmentation="rrc", hflip=0.5)
    loader = create_loader(Digits(train=True), transform, batch_size=200, training=True, workers=workers, seed=3)
    loader.batch_sampler.epoch, loader.batch_sampler.consumed = epoch, consumed
    return list(loader)


def test_pixels_are_the_same_with_and_without_workers_and_from_the_middle_of_an_epoch():
    whole = _loader(workers=0, epoch=1)
    for again in (_loader(workers=2, epoch=1, consumed=400), _loader(workers=0, epoch=1, consumed=400)):
        assert len(again) == 5
        for batch, same in zip(whole[2:], again, strict=True):
            assert torch.equal(batch[0], same[0]) and torch.equal(batch[1], same[1])
    assert not torch.equal(whole[0][0], _loader(workers=0, epoch=2)[0][0])


class _Drawing(torch.utils.data.Dataset):
    """What the generators of an item's transforms give."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return random.random(), np.random.rand(), torch.rand(()).item()


def test_an_image_is_augmented_alike_whatever_stood_before_it_and_others_are_not():
    data = Seeded(_Drawing(), seed=1)
    alone, pair = data[(2, 5)], data.__getitems__([(2, 4), (2, 5)])
    assert alone == pair[1] != pair[0]
    assert len({data[key] for key in [(0, 0), (0, 1), (1, 0), (1, 1)]} | {Seeded(_Drawing(), 2)[(0, 0)]}) == 5


def test_the_networks_random_numbers_do_not_depend_on_who_loads_images():
    drawn = []
    for workers in (0, 1):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        _loader(workers, consumed=1000)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert drawn == 2 * [(random.random(), np.random.rand(), torch.rand(()).item())]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signal")
def test_workers_go_on_when_all_processes_of_a_job_are_told_to_end():
    loader = create_loader(
        Digits(train=True), create_transform((3, 32, 32)), batch_size=50, training=True, workers=1, seed=0
    )
    batches = iter(loader)
    next(batches)
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    assert sum(1 for _ in batches) == 27
