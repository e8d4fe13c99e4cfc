"""The images a study looks at, and whose boxes say where the objects are."""

from __future__ import annotations

import glob
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from defeat_cli.data.annotations import Annotations
from defeat_cli.data.boxes import MIN_SIDE
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.transforms import read_image
from defeat_cli.detectors.contract import Batch, Detector, Target
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.errors import CheckpointError, DataError
from defeat_cli.gradients.pictures import View
from defeat_cli.text import listed

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Files of a folder that are taken for images; a file named by itself may be called anything."""


@dataclass(frozen=True)
class Objects:
    """What is in an image.

    boxes: [M, 4] float32 xyxy in the image's pixels.
    classes: M names.
    origin: whose boxes these are, for people, e.g. `ground truth`.
    """

    boxes: Tensor
    classes: list[str]
    origin: str

    def target(self, detector: Detector) -> Target:
        """The objects that a detector has a class for, in its labels, on its device."""
        label_of = _labels(self.classes, detector)
        known = [i for i, name in enumerate(self.classes) if name in label_of]
        labels = torch.tensor([label_of[self.classes[i]] for i in known], dtype=torch.int64)
        device = device_of(detector)
        return {"boxes": self.boxes[known].to(device), "labels": labels.to(device)}


@dataclass(frozen=True)
class Source:
    """An image file, unread.

    size: (height, width) that its annotations give, where they do.
    objects: its ground truth; None where there is none to be had.
    """

    path: Path
    size: tuple[int, int] | None = None
    objects: Objects | None = None

    def read(self) -> Tensor:
        """[3, H, W] uint8.

        Raises:
            DataError: the file cannot be read, or is not of the size that the annotations give.
        """
        return read_image(self.path, self.size)


def find_images(
    inputs: Sequence[str], annotations: Annotations | None = None, limit: int | None = None
) -> list[Source]:
    """Images by file, folder or glob pattern, each once, in the order given; within a folder by the numbers in names.

    Args:
        annotations: their ground truth, found by file name; None where there is none. Of a folder or pattern the images
            that it knows are taken: such a folder often holds other splits too.
        limit: take so many, from the front.

    Raises:
        DataError: an input leads to no image, or to none that the annotations know.
    """
    ends = _ends(annotations) if annotations is not None else {}
    places: dict[Path, int | None] = {}
    for name in inputs:
        of_input = {path: _place(path, ends) for path in _expand(name)}
        if annotations is not None:
            of_input = {path: place for path, place in of_input.items() if place is not None}
        if not of_input:
            raise DataError(f"{name}: {annotations.origin} has no ground truth for it: no image of this name")
        places |= of_input
    chosen = list(places.items())[:limit]
    return [Source(path) if place is None else _annotated(path, annotations, place) for path, place in chosen]


def images_of(dataset: DetectionDataset, limit: int | None = None) -> list[Source]:
    """The images of a data set with their ground truth; at most `limit`, from the front."""
    count = min(len(dataset), limit or len(dataset))
    return [_annotated(dataset.images / dataset.file_name(i), dataset.annotations, i) for i in range(count)]


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        problem = f"no images in this folder; files ending in {', '.join(sorted(IMAGE_SUFFIXES))} count"
    else:
        found = [Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()]
        problem = "no file matches this pattern" if glob.has_magic(name) else "no such image or folder"
    if not found:
        raise DataError(f"{name}: {problem}")
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> tuple[list[str | int], str]:
    """Sorts paths as people count: `frame_2.jpg` before `frame_10.jpg`."""
    # Splitting by a group gives text and digits in turn, so that places are compared with their own kind.
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def _ends(annotations: Annotations) -> dict[tuple[str, ...], int]:
    """Position of each file name, by its parts; by its last part alone too where it shares that with no other."""
    whole = {Path(name).parts: i for i, name in enumerate(annotations.file_names)}
    alike = Counter(parts[-1] for parts in whole)
    return {parts[-1:]: i for parts, i in whole.items() if alike[parts[-1]] == 1} | whole


def _place(path: Path, ends: dict[tuple[str, ...], int]) -> int | None:
    """Position of the file name that the path ends in, the longest first."""
    parts = path.resolve().parts
    return next((ends[parts[start:]] for start in range(len(parts)) if parts[start:] in ends), None)


def _annotated(path: Path, annotations: Annotations, index: int) -> Source:
    rows = np.flatnonzero((annotations.images == index) & ~annotations.crowd)
    boxes = annotations.boxes[rows].copy()
    boxes[:, 2:] += boxes[:, :2]
    size = annotations.sizes[index]
    if size is not None:
        boxes = boxes.clip(0, [size[1], size[0], size[1], size[0]])
    kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
    classes = [annotations.classes[label - 1] for label in annotations.labels[rows[kept]]]
    return Source(path, size, Objects(torch.from_numpy(boxes[kept]).float(), classes, "ground truth"))


def require_classes(sources: Iterable[Source], detector: Detector, name: str) -> None:
    """Refuse a detector that lacks a class of the ground truth.

    Args:
        name: what the message calls the detector.

    Raises:
        CheckpointError: names the classes.
    """
    used = {kind for source in sources if source.objects for kind in source.objects.classes}
    missing = sorted(used - set(_labels(used, detector)))
    if missing:
        raise CheckpointError(
            f"{name} has no class for {listed(missing)}, which the ground truth has boxes of; "
            f"it knows {listed(detector.classes)}"
        )


def _labels(names: Iterable[str], detector: Detector) -> dict[str, int]:
    """Class name -> the detector's label, for names that it has in this or another form (`aeroplane`, `airplane`)."""
    names = sorted(set(names))
    return {names[n]: label + 1 for n, label in match_classes(names, detector.classes)}


@torch.no_grad()
def detected(detector: Detector, image: Tensor, threshold: float, name: str) -> Objects:
    """What a detector in eval mode finds, to stand in for ground truth.

    Args:
        image: [3, H, W] uint8.
        threshold: lowest score taken.
        name: whose detections they are, e.g. `the teacher`.
    """
    (found,) = detector.detect([image.to(device_of(detector))])
    sure = found["scores"] >= threshold
    classes = [detector.classes[label - 1] for label in found["labels"][sure].tolist()]
    return Objects(found["boxes"][sure].float().cpu(), classes, f"{name}'s detections of score {threshold:g} and above")


def device_of(detector: Detector) -> torch.device:
    return next(detector.parameters()).device


def view_of(batch: Batch) -> View:
    """The first image of a batch for drawing: its own area, without padding, and its boxes."""
    height, width = batch.sizes[0]
    pixels = (batch.pixels[0, :, :height, :width] * 255).round().byte()
    return View(pixels.cpu(), batch.targets[0]["boxes"].cpu())


def distinct_names(sources: Sequence[Source]) -> list[str]:
    """The files' names without suffix; `_2`, `_3` … are added where several files are called alike."""
    names: dict[str, None] = {}
    for source in sources:
        stem = source.path.stem
        numbered = (f"{stem}_{k}" for k in itertools.count(2))
        names[next(name for name in itertools.chain([stem], numbered) if name not in names)] = None
    return list(names)
