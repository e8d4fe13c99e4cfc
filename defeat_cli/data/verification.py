"""Every image of a data set read once, before anything depends on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.faults import Fault, Faults, ImageError
from defeat_cli.data.known import KnownImages, Stamp
from defeat_cli.data.loading import leave_signals
from defeat_cli.data.transforms import check_header, read_image
from defeat_cli.data.unlabelled import ImageFolder
from defeat_cli.errors import DataError

AT_ONCE = 16
"""Images that a process reads between two messages."""
SHOWN = 5
"""Images at fault that a message names."""


class Images(NamedTuple):
    """Image files: the folder, names relative to it, and the (height, width) that each is to have."""

    folder: Path
    names: Sequence[str]
    sizes: Sequence[tuple[int, int]]


class Reading(NamedTuple):
    """What became of one image: its index, and the digest of its pixels (0 of a header alone) or what is wrong."""

    index: int
    digest: int
    error: ImageError | None


class Verifier(NamedTuple):
    """How images are read.

    full: decode them; otherwise read the headers alone, which does not find an image that is cut short.
    workers: processes that read.
    cache: folder in which decoded images are remembered; None remembers nothing.
    on_image: told the number of images done, after some.
    """

    full: bool = True
    workers: int = 0
    cache: Path | None = None
    on_image: Callable[[int], None] = lambda images: None

    def read(self, images: Images) -> tuple[dict[int, ImageError], np.ndarray]:
        """Read every image that is not known to be sound.

        Returns:
            What is wrong, by position, and [N] int64 digests of the pixels (0 where they were not decoded).
        """
        known = KnownImages(images.folder, self.cache)
        digests = np.zeros(len(images.names), dtype=np.int64)
        stamps: dict[int, Stamp] = {}
        for index, (name, size) in enumerate(zip(images.names, images.sizes, strict=True)):
            stamp = _stamp(images.folder / name, size)
            digest = known.digest(name, stamp)
            if digest is None:
                stamps[index] = stamp
            else:
                digests[index] = digest
        self.on_image(len(digests) - len(stamps))
        broken: dict[int, ImageError] = {}
        try:
            for readings in self._reader(images, list(stamps)):
                for index, digest, error in readings:
                    digests[index] = digest
                    if error is not None:
                        broken[index] = error
                    elif self.full:
                        known.add(images.names[index], stamps[index], digest)
                self.on_image(len(readings))
        finally:
            known.save()
        return broken, digests

    def _reader(self, images: Images, indices: list[int]) -> DataLoader:
        """Lists of `Reading`s. A generator of its own, or it would draw from the one that training draws from."""
        return DataLoader(
            _Readings(images, indices, self.full),
            batch_size=AT_ONCE,
            num_workers=min(self.workers, len(indices) // AT_ONCE),
            collate_fn=list,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),
        )


def verified(data: DetectionDataset, faults: Faults, verifier: Verifier) -> DetectionDataset:
    """The data without images that cannot be read, or are of another size than annotated.

    Args:
        faults: is told of these.

    Returns:
        The data, with `digests` of the pixels where images were decoded.

    Raises:
        DataError: an image is at fault, and `faults` does not tolerate it.
    """
    images = Images(data.images, data.annotations.file_names, data.sizes)
    broken, digests = verifier.read(images)
    found = _tell(broken, images, data.annotations.origin, faults)
    good = data.without(sorted(broken))
    good.left_out = [*data.left_out, *found]
    good.digests = np.delete(digests, sorted(broken)) if verifier.full else None
    return good


def verified_folder(folder: ImageFolder, faults: Faults, verifier: Verifier) -> ImageFolder:
    """As `verified`, of images without annotations."""
    images = Images(folder.folder, folder.names, folder.sizes)
    broken, _ = verifier.read(images)
    found = _tell(broken, images, f"data.unlabelled: {folder.folder}", faults)
    good = folder.without(broken)
    good.left_out = [*folder.left_out, *found]
    if not len(good):
        raise DataError(f"data.unlabelled: {folder.folder}: none of its images can be read")
    return good


def _tell(broken: dict[int, ImageError], images: Images, origin: str, faults: Faults) -> list[Fault]:
    """Faults of the broken images, told together: several are one message, and one says it all itself."""
    found = [Fault(broken[i].rule, str(broken[i]), images.folder / images.names[i]) for i in sorted(broken)]
    summary = None
    if len(found) > 1:
        first = [fault.text for fault in found[:SHOWN]]
        rest = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        share = f"{origin}: {len(found)} of its {len(images.names)} images cannot be used"
        summary = "\n  ".join([share, *first, *rest])
    faults.tell(found, summary)
    return found


class _Readings(Dataset):
    """Reads some of the images."""

    def __init__(self, images: Images, indices: list[int], full: bool) -> None:
        self.images = images
        self.indices = indices
        self.full = full

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Reading:
        index = self.indices[place]
        path, size = self.images.folder / self.images.names[index], self.images.sizes[index]
        try:
            if self.full:
                return Reading(index, _digest(read_image(path, size)), None)
            check_header(path, size)
            return Reading(index, 0, None)
        except ImageError as error:
            return Reading(index, 0, error)


def _digest(image: torch.Tensor) -> int:
    """64 bits that tell an image's pixels from others', whatever its file is called or how it is stored."""
    whole = hashlib.sha1(str(tuple(image.shape)).encode() + image.numpy().tobytes(), usedforsecurity=False)
    return int.from_bytes(whole.digest()[:8], "little", signed=True)


def _stamp(path: Path, size: tuple[int, int]) -> Stamp:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return Stamp(-1, -1, *size)  # reading it will say why
    return Stamp(found.st_size, found.st_mtime_ns, *size)
