"""From samples to batches: which images go together, in which order, and the loader processes that read them."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from defeat_cli.data.dataset import DetectionDataset, Sample
from defeat_cli.data.transforms import Target
from defeat_cli.errors import DataError

PREFETCH = 4
"""Batches that each loader process reads ahead."""

LoadedBatch = tuple[list[Tensor], list[Target], list[int]]


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """Batches of an epoch as lists of (epoch, index), shuffled by (seed, epoch) alone.

    Landscape and portrait images go into batches apart, so that padding is small. What is left over of both is joined,
    so that every image is seen in every epoch; one batch of an epoch can be smaller. With several replicas each gets as
    many batches: where they do not divide, the first ones of the epoch are repeated.

    Args:
        sizes: (height, width) of each image.
        batch_size: images a batch, for each replica.
        rank, replicas: which of how many processes this is.
    """

    def __init__(
        self, sizes: list[tuple[int, int]], batch_size: int, seed: int = 0, rank: int = 0, replicas: int = 1
    ) -> None:
        self.landscape = np.array([width >= height for height, width in sizes])
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.replicas = replicas
        self.set_epoch(0)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that this replica gets in a whole epoch."""
        return math.ceil(math.ceil(len(self.landscape) / self.batch_size) / self.replicas)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, counted from 0, and how many of its batches are done already and not to be loaded again."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return max(0, self.batches_per_epoch - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.landscape))
        batches, rest = [], []
        for group in (order[self.landscape[order]], order[~self.landscape[order]]):
            full = len(group) - len(group) % self.batch_size
            batches.extend(group[i : i + self.batch_size] for i in range(0, full, self.batch_size))
            rest.extend(group[full:])
        batches.extend(rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size))
        batches = [batches[i] for i in rng.permutation(len(batches))]
        batches = list(islice(cycle(batches), self.batches_per_epoch * self.replicas))
        mine = batches[self.rank :: self.replicas][self.start :]
        return iter([[(self.epoch, int(index)) for index in batch] for batch in mine])


class Loader(DataLoader):
    """A loader whose processes' `DataError`s arrive as they were raised, without a traceback in the message."""

    def __init__(self, dataset: Dataset, workers: int, **settings: Any) -> None:
        super().__init__(
            _Caught(dataset),
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers > 0 else None,
            worker_init_fn=leave_signals,
            **settings,
        )

    def __iter__(self) -> Iterator[LoadedBatch]:
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def training_loader(
    dataset: DetectionDataset,
    batch_size: int,
    workers: int,
    seed: int = 0,
    *,
    rank: int = 0,
    replicas: int = 1,
) -> Loader:
    """Shuffled batches; `loader.batch_sampler.set_epoch(epoch, start)` chooses which.

    What is in a batch depends on (seed, epoch, rank, replicas), not on the number of workers.
    """
    order = BatchOrder(dataset.sizes, batch_size, seed, rank, replicas)
    return Loader(dataset, workers, batch_sampler=order)


def evaluation_loader(dataset: Dataset, workers: int, *, pin_memory: bool = False) -> Loader:
    """One image at a time in the data set's order; a `Subset` will do.

    In a larger batch an image is padded to the size of others, which changes what is detected on it.
    """
    return Loader(dataset, workers, batch_size=1, pin_memory=pin_memory)


def collate(samples: list[Sample | DataError]) -> LoadedBatch | DataError:
    """Images, targets and image ids as lists, for images differ in size; the first `DataError` if there is one."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, targets, image_ids = zip(*samples, strict=True)
    return list(images), list(targets), list(image_ids)


def leave_signals(_: int) -> None:
    """Ctrl-C reaches every process of a terminal, and a batch system warns all: the main one saves and ends."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Caught(Dataset):
    """A data set that returns its `DataError`s: raised in a loader process, torch would wrap their text in its own."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Sample | DataError:
        try:
            return self.dataset[key]
        except DataError as error:
            return error
