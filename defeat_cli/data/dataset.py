"""Images with boxes, as training and evaluation read them."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from defeat_cli.data.annotations import Annotations
from defeat_cli.data.boxes import FEW_BOXES, clipped_boxes, other_units, without_area
from defeat_cli.data.faults import Fault, Faults
from defeat_cli.data.presence import present
from defeat_cli.data.transforms import Target, Transform, read_image
from defeat_cli.errors import DataError
from defeat_cli.text import counted, listed, out_of


class Sample(NamedTuple):
    """image: [3, H, W] uint8 RGB. image_id: the number by which `DetectionDataset.coco` knows it."""

    image: Tensor
    target: Target
    image_id: int


class DetectionDataset(Dataset):
    """Images with boxes.

    Boxes in targets are clipped to the image; degenerate boxes and crowds are left out. `coco` holds all boxes as the
    annotations have them, for evaluation.

    Args:
        annotations: what is on the images.
        images: folder that their file names are relative to.
        train: whether notes speak of training.
        transforms: applied to each sample in turn.
        seed: of the transforms' random draws, with the epoch and the index.
        layout: how the folder keeps them, a key of `formats.FORMATS`.
        faults: is told of what is wrong; images at fault are left out where it tolerates that.

    Attributes:
        classes: ordered by category id; label `i + 1` is `classes[i]`.
        sizes: (height, width) of each image.
        opening: notes on how the data was found, before those on what is in it.
        left_out: images that are annotated and were left out, each with what is wrong with it.
        digests: [N] int64 that tell images by their pixels; None where they were not all decoded.

    Raises:
        DataError: images that are not there, or boxes that are not what they should be.
    """

    def __init__(
        self,
        annotations: Annotations,
        images: Path,
        train: bool,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
        layout: str = "coco",
        faults: Faults | None = None,
    ) -> None:
        faults = faults or Faults()
        self.images = Path(images)
        self.transforms = tuple(transforms)
        self.seed = seed
        self.layout = layout
        self.train = train
        self.opening: list[str] = []
        self.left_out: list[Fault] = []
        self.digests: np.ndarray | None = None
        self._take(present(annotations, self.images, faults))
        faults.tell(other_units(self.annotations))

    def _take(self, annotations: Annotations) -> None:
        """Become the data set of images that are all there."""
        self.annotations = annotations
        self.classes = annotations.classes
        self.sizes = annotations.sizes
        self._boxes, clipped = clipped_boxes(annotations)
        degenerate = without_area(self._boxes)
        used = np.flatnonzero(~degenerate & ~annotations.crowd)
        used = used[np.argsort(annotations.images[used], kind="stable")]
        self._boxes, self._labels = self._boxes[used], annotations.labels[used]
        self._first = np.searchsorted(annotations.images[used], np.arange(len(self) + 1))
        self._notes = self._described(int(clipped.sum()), int(degenerate.sum()))

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    @property
    def notes(self) -> list[str]:
        """One line for each thing that a user should know about this data."""
        return [*self.opening, *self._notes]

    @property
    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """The boxes to learn from: [M, 4] xyxy in pixels of their images, and [M] the position of each one's image."""
        return self._boxes, np.repeat(np.arange(len(self)), np.diff(self._first))

    def without(self, gone: Sequence[int]) -> DetectionDataset:
        """The same data without the images at these positions."""
        other = copy.copy(self)
        for name in ("coco", "_numbers"):
            vars(other).pop(name, None)
        other._take(self.annotations.without_images(gone))
        other.digests = None
        return other

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at an index, or at (epoch, index): its random changes are others in each epoch.

        The epoch comes with the index because loader processes, which live through all epochs, see nothing else.

        Raises:
            DataError: the image cannot be read, or is not of the size that the annotations give.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        image = read_image(self.images / self.file_name(index), self.sizes[index])
        mine = slice(self._first[index], self._first[index + 1])
        target = {
            "boxes": torch.from_numpy(self._boxes[mine].copy()),
            "labels": torch.from_numpy(self._labels[mine].copy()),
        }
        if self.transforms:
            rng = np.random.default_rng((self.seed, epoch, index))
            for transform in self.transforms:
                image, target = transform(image, target, rng)
        return Sample(image, target, self._numbers[index])

    def file_name(self, index: int) -> str:
        """The image's file, relative to the image folder."""
        return self.annotations.file_names[index]

    def file_of(self, image_id: int) -> Path:
        """The file of a sample's image."""
        return self.images / self.file_name(self._numbers.index(image_id))

    @cached_property
    def _numbers(self) -> list[int]:
        """Image ids as small numbers in the order of the ids: pycocotools makes floats of large ones."""
        ids = self.annotations.image_ids
        numbers = np.empty(len(ids), dtype=np.int64)
        numbers[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(1, len(ids) + 1)
        return numbers.tolist()

    @cached_property
    def coco(self) -> COCO:
        """Ground truth for pycocotools, every box as the annotations have it.

        Images and annotations are numbered anew from 1 (pycocotools takes a match with id 0 for none), and categories
        by their labels; `in_own_ids` turns detections back.
        """
        a = self.annotations
        numbers = np.array(self._numbers)[a.images].tolist()
        rows = zip(numbers, a.labels.tolist(), a.boxes.tolist(), a.areas.tolist(), a.crowd.tolist(), strict=True)
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [
                {"id": number, "file_name": name, "height": height, "width": width}
                for number, name, (height, width) in zip(self._numbers, a.file_names, self.sizes, strict=True)
            ],
            "categories": [{"id": label, "name": name} for label, name in enumerate(a.classes, start=1)],
            "annotations": [
                {"id": i, "image_id": image, "category_id": kind, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for i, (image, kind, box, area, crowd) in enumerate(rows, start=1)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def in_own_ids(self, detections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detections in `coco`'s numbers with the ids of the annotations in their place."""
        image_ids = dict(zip(self._numbers, self.annotations.image_ids, strict=True))
        category_ids = self.annotations.category_ids
        return [
            {**d, "image_id": image_ids[d["image_id"]], "category_id": category_ids[d["category_id"] - 1]}
            for d in detections
        ]

    def refuse_vanishing(self, short_sides: Sequence[int], long_side: int) -> None:
        """Refuse images of which nothing is left after resizing.

        Args:
            short_sides, long_side: pixels, as `data.short_side` and `data.long_side`.

        Raises:
            DataError: the first image of which a side becomes 0.
        """
        paths = [self.images / name for name in self.annotations.file_names]
        refuse_vanishing(paths, self.sizes, short_sides, long_side)

    def refuse_boxless(self, what: str, faults: Faults | None = None) -> None:
        """Refuse data that nothing can be learned from nor scored on.

        Args:
            what: these images, for the message, e.g. `validation`.

        Raises:
            DataError: no image has a box.
        """
        if not len(self._boxes):
            held = len(self.annotations.labels)
            but = f" but {counted(held, 'crowd or box', 'crowds or boxes')} without area" if held else ""
            text = f"{self.annotations.origin}: the {what} images have no boxes{but}: nothing to learn or to score"
            (faults or Faults()).tell(Fault("boxless", text))

    def _files(self) -> list[str]:
        """Every image's whole path, links followed up to the folder."""
        folder = os.path.realpath(self.images)
        return [os.path.normpath(os.path.join(folder, name)) for name in self.annotations.file_names]

    def _content(self, index: int) -> tuple | None:
        """What tells an image from others without reading it: name, size, classes and boxes; None without boxes."""
        mine = slice(self._first[index], self._first[index + 1])
        kinds = tuple(self.classes[label - 1] for label in self._labels[mine])
        name = os.path.basename(self.file_name(index))
        return (name, self.sizes[index], kinds, self._boxes[mine].tobytes()) if kinds else None

    def _described(self, clipped: int, degenerate: int) -> list[str]:
        train = self.train
        notes = list(self.annotations.notes)
        if clipped and train:
            notes.append(
                f"{counted(clipped, 'box reaches', 'boxes reach')} beyond the image and is clipped in training"
            )
        total = len(self.annotations.boxes)
        if clipped > total / 2 and total >= FEW_BOXES:
            notes.append(f"{clipped} of {total} boxes reach beyond their images: are they of images of another size?")
        if degenerate:
            fate = "left out of training" if train else "still in the ground truth, and will count as missed"
            notes.append(f"{counted(degenerate, 'box', 'boxes')} without area: {fate}")
        folded = Counter(name.casefold() for name in self.classes if len(name) > 1)
        alike = [name for name in self.classes if folded[name.casefold()] > 1]
        if alike:
            notes.append(f"classes that differ by case alone are classes of their own: {listed(alike, 8)}")
        present = set(self.annotations.labels[~self.annotations.crowd].tolist())
        absent = [name for label, name in enumerate(self.classes, start=1) if label not in present]
        if absent:
            without = out_of(len(absent), len(self.classes), "class", "has no box", "have no box")
            notes.append(f"{without}: {listed(absent, 8)}")
        empty = int((np.diff(self._first) == 0).sum())
        if empty and train:
            notes.append(f"{counted(empty, 'image has', 'images have')} no box; used as background")
        return [f"{self.annotations.origin}: {note}" for note in notes]


def refuse_vanishing(
    paths: Sequence[Path], sizes: Sequence[tuple[int, int]], short_sides: Sequence[int], long_side: int
) -> None:
    """See `DetectionDataset.refuse_vanishing`; paths and (height, width) of the images."""
    sides = np.array(sizes, dtype=np.float64)
    scale = np.minimum(min(short_sides) / sides.min(axis=1), long_side / sides.max(axis=1))
    gone = np.flatnonzero((sides.min(axis=1) * scale).astype(np.int64) == 0)
    if gone.size:
        height, width = sizes[gone[0]]
        raise DataError(
            f"{paths[gone[0]]}: is {width}x{height} (width x height); resized to a long side of {long_side} its short "
            "side is 0 pixels. Leave it out, crop it, or raise data.long_side"
        )


def shared_images(train: DetectionDataset, val: DetectionDataset) -> list[int]:
    """Positions of validation images that are training images too.

    An image is the same where its file is, where name, size, classes and boxes all are, or where both data sets have
    `digests` and those are.
    """
    files, contents = set(train._files()), {train._content(i) for i in range(len(train))} - {None}
    shared = {i for i, file in enumerate(val._files()) if file in files or val._content(i) in contents}
    if train.digests is not None and val.digests is not None:
        shared |= set(np.flatnonzero(np.isin(val.digests, train.digests)).tolist())
    return sorted(shared)


def overlap(train: DetectionDataset, val: DetectionDataset) -> str | None:
    """What validation images are among the training images, in words; None where there are none."""
    shared = [val.file_name(i) for i in shared_images(train, val)]
    if not shared:
        return None
    are = out_of(len(shared), len(val), "validation image", "is a training image", "are training images")
    return f"{are} too ({listed(shared, 3)}): the figures will be too good"
