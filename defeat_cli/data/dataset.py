"""Images with boxes from a COCO file (or what reads like one), and where a folder keeps them."""

from __future__ import annotations

import contextlib
import io
import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from defeat_cli.data.annotations import Annotations, Id, parse_annotations, read_annotations
from defeat_cli.data.formats.voc import find_image_sets, is_voc, read_voc
from defeat_cli.data.transforms import horizontal_flip, image_size, read_image
from defeat_cli.errors import DataError

LAYOUTS = (("annotations/instances_{split}2017.json", "{split}2017"), ("{split}.json", "images"))
"""Annotation file and image folder: COCO's own layout, and the simple one."""
MIN_SIDE = 0.1
"""Thinner boxes, in pixels, hold nothing to learn and can vanish when resized."""
CLIP_NOTICE = 1.0
"""Boxes that leave the image by less than so many pixels are clipped without a word: COCO's own are rounded so."""


class Sample(NamedTuple):
    """image: [3, H, W] uint8 RGB. target: `boxes` [M, 4] float32 xyxy pixels, `labels` [M] int64 in 1..K."""

    image: Tensor
    target: dict[str, Tensor]
    image_id: Id


class CocoDataset(Dataset):
    """Images with boxes.

    Boxes in targets are clipped to the image; degenerate boxes and crowds are left out. `coco` holds all boxes as the
    file has them, for evaluation.

    Args:
        annotations: a COCO file, or content like that of one.
        images: folder that its file names are relative to.
        train: whether images are flipped, and whether notes speak of training.
        flip: chance of a horizontal flip, decided by (seed, epoch, index) alone.

    Attributes:
        classes, category_ids: ordered by category id; label `i + 1` is `classes[i]`.
        image_ids, sizes: id and (height, width) of each image.
        notes: one line for each thing that a user should know about this data.

    Raises:
        DataError: annotations that cannot be used, or images that are not there.
    """

    def __init__(
        self, annotations: Path | dict[str, Any], images: Path, train: bool, flip: float = 0.0, seed: int = 0
    ) -> None:
        self.images = Path(images)
        if isinstance(annotations, dict):
            self.annotations = parse_annotations(annotations, str(images))
        else:
            self.annotations = read_annotations(Path(annotations))
        self.flip = flip if train else 0.0
        self.seed = seed
        self.classes = self.annotations.classes
        self.category_ids = self.annotations.category_ids
        self.image_ids = self.annotations.image_ids
        self._refuse_missing()
        self.sizes = [
            size or image_size(self.images / name)
            for size, name in zip(self.annotations.sizes, self.annotations.file_names, strict=True)
        ]
        self._boxes, clipped = _clip(self.annotations, self.sizes)
        degenerate = (self._boxes[:, 2:] - self._boxes[:, :2] < MIN_SIDE).any(axis=1)
        used = np.flatnonzero(~degenerate & ~self.annotations.crowd)
        used = used[np.argsort(self.annotations.images[used], kind="stable")]
        self._boxes, self._labels = self._boxes[used], self.annotations.labels[used]
        self._first = np.searchsorted(self.annotations.images[used], np.arange(len(self.image_ids) + 1))
        self.notes = self._notes(train, int(clipped.sum()), int(degenerate.sum()))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at an index, or at (epoch, index): its random flip is another one in each epoch.

        The epoch comes with the index because loader processes, which live through all epochs, see nothing else.

        Raises:
            DataError: the image cannot be read, or is not of the size that the annotations give.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        image = read_image(self.images / self.file_name(index), self.sizes[index])
        mine = slice(self._first[index], self._first[index + 1])
        boxes = torch.from_numpy(self._boxes[mine].copy())
        if self.flip and np.random.default_rng((self.seed, epoch, index)).random() < self.flip:
            image, boxes = horizontal_flip(image, boxes)
        target = {"boxes": boxes, "labels": torch.from_numpy(self._labels[mine].copy())}
        return Sample(image, target, self.image_ids[index])

    def file_name(self, index: int) -> str:
        """The image's file, relative to the image folder."""
        return self.annotations.file_names[index]

    @cached_property
    def coco(self) -> COCO:
        """Ground truth for pycocotools, every box as the file has it.

        Annotations are numbered anew from 1: pycocotools takes a match with id 0 for none.
        """
        a = self.annotations
        image_ids = [a.image_ids[i] for i in a.images]
        category_ids = [a.category_ids[label - 1] for label in a.labels]
        rows = zip(image_ids, category_ids, a.boxes.tolist(), a.areas.tolist(), a.crowd.tolist(), strict=True)
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [
                {"id": image_id, "file_name": name, "height": height, "width": width}
                for image_id, name, (height, width) in zip(a.image_ids, a.file_names, self.sizes, strict=True)
            ],
            "categories": [{"id": i, "name": name} for i, name in zip(a.category_ids, a.classes, strict=True)],
            "annotations": [
                {"id": i, "image_id": image, "category_id": kind, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for i, (image, kind, box, area, crowd) in enumerate(rows, start=1)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def _refuse_missing(self) -> None:
        """One listing a folder, not one question a file: there may be 100,000 of them on a network disk."""
        names = self.annotations.file_names
        listings = {}
        for parent in {os.path.dirname(name) for name in names}:
            folder = self.images / parent
            listings[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
        missing = [name for name in names if os.path.basename(name) not in listings[os.path.dirname(name)]]
        if missing:
            first = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            share = f"{len(missing)} of its {len(names)} images"
            raise DataError(f"{self.annotations.origin}: {share} are not in {self.images}: {first}")

    def _notes(self, train: bool, clipped: int, degenerate: int) -> list[str]:
        notes = []
        if clipped and train:
            notes.append(f"{_count(clipped, 'box reaches', 'boxes reach')} beyond the image and is clipped in training")
        if degenerate:
            fate = "left out of training" if train else "still in the ground truth, and will count as missed"
            notes.append(f"{_count(degenerate, 'box', 'boxes')} without area: {fate}")
        present = set(self.annotations.labels[~self.annotations.crowd].tolist())
        absent = [name for label, name in enumerate(self.classes, start=1) if label not in present]
        if absent:
            names = ", ".join(absent[:8]) + (", …" if len(absent) > 8 else "")
            notes.append(f"{len(absent)} of {len(self.classes)} classes have no box: {names}")
        empty = int((np.diff(self._first) == 0).sum())
        if empty and train:
            notes.append(f"{_count(empty, 'image has', 'images have')} no box; used as background")
        return [f"{self.annotations.origin}: {note}" for note in notes]


def find_split(path: Path, split: str, annotations: str | None = None, images: str | None = None) -> tuple[Path, Path]:
    """Annotation file and image folder of a split.

    Args:
        split: `train` or `val`.
        annotations, images: relative to `path`, in place of what the layouts say.

    Raises:
        DataError: nothing there; lists what was looked for.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    looked_for = []
    for layout_file, layout_folder in LAYOUTS:
        file = path / (annotations or layout_file.format(split=split))
        folder = path / (images or layout_folder.format(split=split))
        if file.is_file() and folder.is_dir():
            return file, folder
        line = f"{file}{_absent(file.is_file())} with {folder}{os.sep}{_absent(folder.is_dir())}"
        if line not in looked_for:
            looked_for.append(line)
    voc = "For VOC's layout: JPEGImages, Annotations and ImageSets/Main"
    raise DataError("\n  ".join([f"{path}: no {split} data there. Looked for", *looked_for, voc]))


def open_split(
    path: Path,
    split: str,
    format: str = "auto",
    annotations: str | None = None,
    images: str | None = None,
    *,
    train: bool,
    flip: float = 0.0,
    seed: int = 0,
) -> CocoDataset:
    """One split of a data set in COCO's, the simple, or VOC's layout.

    Args:
        split: `train` or `val`.
        format: `coco`, `voc`, or `auto` to see from the folder.
        annotations: file relative to `path`; for VOC image sets (see `voc.find_image_sets`).
        images: folder relative to `path`; not for VOC.
        train, flip, seed: see `CocoDataset`.

    Raises:
        DataError: no data there, or data that cannot be used.
    """
    names_json = annotations is not None and annotations.endswith(".json")
    if format == "voc" or (format == "auto" and not names_json and is_voc(path)):
        image_sets = find_image_sets(path, split, annotations)
        return CocoDataset(read_voc(path, image_sets), path, train, flip, seed)
    file, folder = find_split(path, split, annotations, images)
    return CocoDataset(file, folder, train, flip, seed)


def _clip(annotations: Annotations, sizes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """[A, 4] float32 xyxy inside the images, and [A] bool of those that were noticeably outside."""
    boxes = annotations.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    heights, widths = np.array(sizes, dtype=np.float64)[annotations.images].T
    limits = np.stack([widths, heights, widths, heights], axis=1)
    inside = boxes.clip(0, limits)
    return inside.astype(np.float32), (np.abs(inside - boxes) > CLIP_NOTICE).any(axis=1)


def _absent(there: bool) -> str:
    return "" if there else " (not there)"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
