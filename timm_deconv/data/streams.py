"""Data sets without an order: shards of WebDataset and streams of the Hub, read by timm.

What an epoch shows is drawn from shards and a buffer, by seed and epoch. A run that is resumed in the middle of an
epoch draws the rest of it anew: some images come twice, others not.
"""

import importlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from timm_deconv.errors import InputError, last_line, needs_extra

from .datasets import first_split, unknown_label
from .images import mode_of

__all__ = ["STREAMS", "ImageStream", "StreamLoader", "create_stream", "evaluation_loader"]

STREAMS = ("wds/", "hfids/")
"""Starts of the names of data sets without an order."""

READER = "timm.data.readers.reader_wds"
"""Of timm: tells a logger of every shard or image that it leaves out."""


class ImageStream(timm.data.IterableImageDataset):
    """timm's stream of (PIL image, class index), which stops at more unreadable images than it may leave out.

    Attributes:
        max_unreadable: images that each worker may leave out in an epoch.
    """

    max_unreadable = 0

    def first(self, images: int) -> "ImageStream":
        """Let an epoch end after so many images; return this stream."""
        self.reader.num_samples = images
        return self

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        watch = _Watch(self.max_unreadable)
        logger = logging.getLogger(READER)
        logger.addHandler(watch)
        try:
            yield from islice(super().__iter__(), None if self.reader.is_training else self.reader.num_samples)
        finally:
            logger.removeHandler(watch)


class _Watch(logging.Handler):
    """Counts what the reader leaves out, which it tells its logger from where it has caught the error."""

    def __init__(self, limit: int) -> None:
        super().__init__(logging.WARNING)
        self.limit, self.count = limit, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Name the image, and stop at one too many."""
        _, error, trace = sys.exc_info()
        if error is None or trace is None:
            return
        sample = trace.tb_frame.f_locals.get("sample")
        known = isinstance(sample, dict) and "__key__" in sample
        place = f"{sample['__key__']} of {sample.get('__url__')}" if known else "of a shard"
        told = f"unreadable image {place}: {error}"
        if self.count == self.limit:
            raise OSError(f"{told}; {self.limit} were left out before, as many as max_unreadable allows") from None
        self.count += 1
        print(f"left out: {told} ({self.count} of at most {self.limit})", file=sys.stderr, flush=True)


class KnownLabel:
    """Passes classes on and refuses others; a class, as workers must be able to pickle it."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, label: int) -> int:
        if not 0 <= label < self.num_classes:
            raise InputError(unknown_label(label, self.num_classes))
        return int(label)


def create_stream(
    name: str,
    root: str | None,
    split: str,
    *,
    training: bool,
    num_classes: int,
    channels: int = 3,
    seed: int = 0,
    input_key: str | None = None,
    target_key: str | None = None,
) -> ImageStream:
    """Create one split of a data set without an order.

    Args:
        name: `wds/` for shards in `root`, or `hfids/NAME` of the Hub or `hfids/FOLDER`.
        root: folder or address of the shards; of `hfids` the cache.
        split: train or validation, which _info.json beside the shards explains; or their names and how many images
            they hold, 'train-{0000..0063}.tar|1281167'. Of `hfids` the split's name, with '|COUNT' where the data set
            does not say it.
        training: shuffle.
        num_classes: of the network.
        channels: 1 or 3; images are converted.
        seed: of the order.
        input_key, target_key: columns of images and classes; by default jpg, png or webp and cls, image and label.

    Raises:
        InputError: a package is missing, or the split cannot be had, or nothing says how many images it has.
    """
    kind = name.split("/")[0]
    with needs_extra("wds" if kind == "wds" else "hfds"):
        importlib.import_module("webdataset" if kind == "wds" else "datasets")
    keys: dict[str, Any] = {
        key: value for key, value in (("input_key", input_key), ("target_key", target_key)) if value
    }
    part, _, count = split.partition("|")
    if kind == "hfids" and count:
        split, keys["num_samples"] = part, int(count)
    if kind == "wds" and root is None:
        raise InputError("wds/ needs the folder or address of the shards: give --data-dir (or data_dir=...)")
    settings = {"reader": name, "is_training": training, "seed": seed, "input_img_mode": mode_of(channels)}

    def create(part: str) -> ImageStream:
        stream = ImageStream(root, split=part, **settings, **keys)
        if kind == "hfids":
            stream.reader.builder.as_streaming_dataset(split=part)  # which says whether there is one
        return stream

    stream = first_split(name, split, create)
    stream.target_transform = KnownLabel(num_classes)
    if not stream.reader.num_samples:
        raise InputError(f"nothing says how many images {split!r} has; write {split}|COUNT")
    return stream


@dataclass
class Place:
    """Where an epoch of a stream begins, by the names of `EpochSampler`: batches count over all processes."""

    epoch: int = 0
    consumed: int = 0
    process: int = 0
    processes: int = 1


class StreamLoader:
    """Training batches of a stream, (uint8 images (B, C, H, W), classes (B,)); every process reads shards of its own.

    Args:
        stream: made for training.
        batch_size: images a batch, over all processes.
        seed: of the order.
        settings: of torch's loader; `num_workers` among them.

    Attributes:
        batch_sampler: where iteration begins, and for which process.
    """

    def __init__(self, stream: ImageStream, batch_size: int, seed: int, **settings: Any) -> None:
        self.stream, self.batch_size, self.seed, self.settings = stream, batch_size, seed, settings
        self.batch_sampler = Place()

    def __len__(self) -> int:
        return self.stream.reader.num_samples // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        place, reader, workers = self.batch_sampler, self.stream.reader, self.settings["num_workers"]
        self._check_shards(max(1, workers) * place.processes)
        begun = place.consumed // self.batch_size
        drawn = int(np.random.SeedSequence((self.seed, place.epoch, begun)).generate_state(1)[0]) % 2**30
        reader.batch_size = self.batch_size // place.processes
        reader.worker_seed, reader.ds = drawn, None  # of workers torch draws it, from the generator
        self.stream.set_loader_cfg(num_workers=workers)
        self.stream.set_epoch(drawn)
        generator = torch.Generator().manual_seed(drawn)
        loader = DataLoader(self.stream, reader.batch_size, drop_last=True, generator=generator, **self.settings)
        try:
            yield from islice(loader, len(self) - begun)
        except RuntimeError as error:
            if "shard" not in str(error):
                raise
            raise InputError(f"workers={workers}: too few shards for so many processes ({last_line(error)})") from None

    def _check_shards(self, readers: int) -> None:
        shards = getattr(getattr(self.stream.reader, "split_info", None), "filenames", None)
        if shards is not None and len(shards) < readers:
            raise InputError(f"{len(shards)} shards for {readers} processes that load images; lower workers")


def evaluation_loader(stream: ImageStream, batch_size: int, *, num_workers: int, **settings: Any) -> DataLoader:
    """Create a loader of every image of a stream once, in its order, as (uint8 images (B, C, H, W), classes (B,)).

    Every process reads the whole stream, and accelerate lets it keep its share. One worker at most reads it, as the
    shares of a batch are taken where it is read.
    """
    reader, workers = stream.reader, min(num_workers, 1)
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    stream.set_loader_cfg(num_workers=workers)
    return DataLoader(stream, batch_size, num_workers=workers, generator=torch.Generator(), **settings)
