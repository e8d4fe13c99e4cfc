"""Images without annotations, and batches that have some of them beside the labelled ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from defeat_cli.data.dataset import DetectionDataset, Sample, refuse_vanishing
from defeat_cli.data.faults import Fault, Faults, ImageError
from defeat_cli.data.images import SUFFIXES, FileIndex, is_image
from defeat_cli.data.loading import BatchOrder, Keys, Loader
from defeat_cli.data.transforms import Transform, image_size, read_image
from defeat_cli.errors import DataError
from defeat_cli.text import listed

NO_BOXES = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


class ImageFolder(Dataset):
    """The images of a folder and its subfolders, in the order of their names. Their targets are None.

    Args:
        faults: is told of images whose headers cannot be read, which are left out where it tolerates that.
        transforms, seed: as of the labelled images, with the pass over the folder in place of the epoch.

    Attributes:
        names: paths relative to the folder.
        sizes: (height, width) of each image.
        others: how many other files the folder holds; hidden ones do not count.
        left_out: images that cannot be read and were left out, each with what is wrong with it.

    Raises:
        DataError: no such folder, no image in it, or images that cannot be read, by their headers.
    """

    def __init__(
        self, folder: Path, transforms: Sequence[Transform] = (), seed: int = 0, faults: Faults | None = None
    ) -> None:
        self.folder = Path(folder)
        self.transforms = tuple(transforms)
        self.seed = seed
        if not self.folder.is_dir():
            raise DataError(f"data.unlabelled: {folder}: no such folder")
        files = FileIndex(self.folder, lambda name: not name.startswith(".")).paths
        self.names = [name for name in files if is_image(name)]
        self.others = len(files) - len(self.names)
        if not self.names:
            suffixes = ", ".join(sorted(SUFFIXES))
            raise DataError(f"data.unlabelled: {folder}: no images in this folder; files ending in {suffixes} count")
        self.names, self.sizes = self._read_sizes(faults or Faults())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The image at (pass over the folder, index), without a target.

        Raises:
            DataError: it cannot be read.
        """
        number, index = key
        image = read_image(self.folder / self.names[index], self.sizes[index])
        rng = np.random.default_rng((self.seed, number, index))
        for transform in self.transforms:
            image, _ = transform(image, NO_BOXES, rng)
        return Sample(image, None, self.names[index])

    def refuse_vanishing(self, short_sides: Sequence[int], long_side: int) -> None:
        """As `DetectionDataset.refuse_vanishing`."""
        refuse_vanishing([self.folder / name for name in self.names], self.sizes, short_sides, long_side)

    def shared_with(self, data: DetectionDataset) -> int:
        """How many of these images are images of annotated data too: the same file by the same name, links followed."""
        names = {os.path.basename(name) for name in self.names}
        # Only files that are called alike are asked for: there may be 100,000 of them on a network disk.
        theirs = [data.images / data.file_name(i) for i in range(len(data))]
        known = {_identity(path) for path in theirs if path.name in names}
        alike = {path.name for path in theirs}
        return sum(_identity(self.folder / n) in known for n in self.names if os.path.basename(n) in alike)

    def _read_sizes(self, faults: Faults) -> tuple[list[str], list[tuple[int, int]]]:
        """Names and sizes of the images whose headers can be read."""
        sizes, broken = {}, []
        for name in self.names:
            try:
                sizes[name] = image_size(self.folder / name)
            except ImageError as error:
                broken.append(Fault(error.rule, str(error), self.folder / name))
        shown = listed([fault.text for fault in broken], 3)
        faults.tell(broken, f"data.unlabelled: {shown}. Mend them, or move them elsewhere")
        self.left_out = broken
        return list(sizes), list(sizes.values())

    def without(self, gone: Collection[int]) -> ImageFolder:
        """The same images without those at some positions."""
        other = copy.copy(self)
        other.names = [name for i, name in enumerate(self.names) if i not in gone]
        other.sizes = [size for i, size in enumerate(self.sizes) if i not in gone]
        return other


class Mixed(Dataset):
    """Labelled images, and behind them unlabelled ones; keys are (epoch or pass, index)."""

    def __init__(self, labelled: DetectionDataset, unlabelled: ImageFolder) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        number, index = key
        if index < len(self.labelled):
            return self.labelled[key]
        return self.unlabelled[number, index - len(self.labelled)]


class MixedOrder(BatchOrder):
    """Batches of an epoch over labelled images, each with as many unlabelled ones behind them.

    An epoch is one pass over the labelled images. The unlabelled ones cycle: batch after batch from the first epoch on,
    each pass over them as `BatchOrder` shuffles it, so that all are seen once before one is seen again. What goes with
    a batch depends on the seed and on the batch's number since the run began, so resuming needs no state.

    Args:
        sizes, batch_size: of the labelled images.
        unlabelled_sizes, unlabelled_batch: of the unlabelled ones; the last batch of a pass can be smaller.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        unlabelled_sizes: Sequence[tuple[int, int]],
        unlabelled_batch: int,
        seed: int = 0,
    ) -> None:
        super().__init__(sizes, batch_size, seed)
        # Another seed: two sets of equal length are not to be shuffled alike.
        self.unlabelled = BatchOrder(unlabelled_sizes, unlabelled_batch, seed + 1)

    def __iter__(self) -> Iterator[Keys]:
        first, passes = self.epoch * self.batches_per_epoch + self.start, {}
        for number, batch in enumerate(super().__iter__(), start=first):
            done, place = divmod(number, self.unlabelled.batches_per_epoch)
            if done not in passes:
                self.unlabelled.set_epoch(done)
                passes = {done: list(self.unlabelled)}
            yield batch + [(done, len(self.landscape) + index) for _, index in passes[done][place]]

    def images_of(self, batch: Keys) -> int:
        return sum(index < len(self.landscape) for _, index in batch)

    def cut(self, batch: Keys, into: int) -> list[Keys]:
        """Each piece has labelled images, and its part of the unlabelled ones."""
        labelled = self.images_of(batch)
        into = min(into, labelled)
        return [batch[:labelled][i::into] + batch[labelled:][i::into] for i in range(into)]


def mixed_loader(
    labelled: DetectionDataset,
    unlabelled: ImageFolder,
    batch_size: int,
    unlabelled_batch: int,
    workers: int,
    seed: int = 0,
    *,
    share: Callable[[BatchOrder], Sampler[Keys]] = lambda order: order,
) -> Loader:
    """As `training_loader`, with unlabelled images at the end of each batch, whose targets are None."""
    order = share(MixedOrder(labelled.sizes, batch_size, unlabelled.sizes, unlabelled_batch, seed))
    return Loader(Mixed(labelled, unlabelled), workers, batch_sampler=order)


def _identity(path: Path) -> tuple[int, int]:
    """What tells a file from all others, whatever its name."""
    found = path.stat()
    return found.st_dev, found.st_ino
