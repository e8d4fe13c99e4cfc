"""From samples to batches: which images go together, in which order, and the loader processes that read them."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from defeat_cli.data.dataset import DetectionDataset, Sample
from defeat_cli.data.transforms import Target
from defeat_cli.errors import DataError

PREFETCH = 4
"""Batches that each loader process reads ahead."""

Keys = list[tuple[int, int]]
"""What a batch is made of: (epoch, index) of each image."""

LoadedBatch = tuple[list[Tensor], list[Target], list[int]]


class BatchOrder(Sampler[Keys]):
    """Batches of an epoch as lists of (epoch, index), shuffled by (seed, epoch) alone.

    Landscape and portrait images go into batches apart, so that padding is small. What is left over of both is joined,
    so that every image is seen in every epoch; one batch of an epoch can be smaller. `sharing.StepOrder` shares them
    out over processes.

    Args:
        sizes: (height, width) of each image.
        batch_size: images a batch.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, seed: int = 0) -> None:
        self.landscape = np.array([width >= height for height, width in sizes])
        self.batch_size = batch_size
        self.seed = seed
        self.set_epoch(0)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return math.ceil(len(self.landscape) / self.batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, counted from 0, and how many of its batches are done already and not to be loaded again."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return max(0, self.batches_per_epoch - self.start)

    def __iter__(self) -> Iterator[Keys]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.landscape))
        batches, rest = [], []
        for group in (order[self.landscape[order]], order[~self.landscape[order]]):
            full = len(group) - len(group) % self.batch_size
            batches.extend(group[i : i + self.batch_size] for i in range(0, full, self.batch_size))
            rest.extend(group[full:])
        batches.extend(rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size))
        batches = [batches[i] for i in rng.permutation(len(batches))]
        return iter([[(self.epoch, int(index)) for index in batch] for batch in batches[self.start :]])

    def images_of(self, batch: Keys) -> int:
        """Labelled images of a batch."""
        return len(batch)

    def cut(self, batch: Keys, into: int) -> list[Keys]:
        """A batch in so many pieces, of sizes that differ by one at most; in fewer where it has not as many images."""
        into = min(into, len(batch))
        return [batch[i::into] for i in range(into)]


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
    share: Callable[[BatchOrder], Sampler[Keys]] = lambda order: order,
) -> Loader:
    """Shuffled batches; `loader.batch_sampler.set_epoch(epoch, start)` chooses which.

    What is in a batch depends on (seed, epoch), not on the number of workers.

    Args:
        share: which of the batches, or of their pieces, this process gets; see `sharing.StepOrder`.
    """
    order = share(BatchOrder(dataset.sizes, batch_size, seed))
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
