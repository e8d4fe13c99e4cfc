"""Faults that show in a whole data set, once it is opened and its images are read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from defeat_cli.data.boxes import clipped_boxes, without_area
from defeat_cli.data.dataset import DetectionDataset, shared_images
from defeat_cli.data.faults import Fault
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.text import listed


def box_faults(data: DetectionDataset) -> list[Fault]:
    """Boxes with a negative side, without area, beyond their image, and those that are there twice."""
    boxes = data.annotations.boxes
    clipped, outside = clipped_boxes(data.annotations)
    negative = (boxes[:, 2:] < 0).any(axis=1)
    empty = without_area(clipped) & ~negative
    rows = np.column_stack([data.annotations.images, data.annotations.labels, data.annotations.crowd, boxes])
    _, first, place = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    twice = first[place.ravel()] != np.arange(len(rows))
    found = [
        ("negative", negative, lambda i: "has a negative side"),
        ("no area", empty, lambda i: "has no area inside its image"),
        ("outside", outside & ~negative & ~empty, lambda i: "reaches beyond its image, " + _size(data, i)),
        ("duplicate box", twice, lambda i: "is there before, with the same class"),
    ]
    return [fault for rule, mask, why in found for fault in _of_boxes(data, rule, np.flatnonzero(mask), why)]


def repeated_images(data: DetectionDataset) -> list[Fault]:
    """Images with the same pixels as an earlier one of their split, where digests are known."""
    if data.digests is None:
        return []
    first: dict[int, int] = {}
    faults = []
    for i, digest in enumerate(data.digests.tolist()):
        earlier = first.setdefault(digest, i)
        if earlier != i:
            text = f"{data.images / data.file_name(i)}: has the pixels of {data.file_name(earlier)}"
            faults.append(Fault("same image", text, data.images / data.file_name(i)))
    return faults


def images_in_both(train: DetectionDataset, val: DetectionDataset) -> list[Fault]:
    """Validation images that are training images too."""
    paths = [val.images / val.file_name(i) for i in shared_images(train, val)]
    return [Fault("in both", f"{path}: is a training image too", path) for path in paths]


def class_faults(train: DetectionDataset, val: DetectionDataset) -> list[Fault]:
    """Classes that only one of two splits has boxes of; and splits that share none by their names, where nothing can be
    scored."""
    pairs = match_classes(train.classes, val.classes)
    if not pairs:
        text = f"training has {listed(train.classes)}; validation has {listed(val.classes)}"
        return [Fault("classes apart", f"{val.annotations.origin}: shares no class with the training data: {text}")]
    theirs = {val.classes[v]: train.classes[t] for t, v in pairs}
    trained, validated = _used(train), {theirs.get(name, name) for name in _used(val)}
    faults = []
    for name in [*train.classes, *(name for name in val.classes if name not in theirs)]:
        if (name in trained) != (name in validated):
            here, there = ("training", "validation") if name in trained else ("validation", "training")
            faults.append(Fault("one split", f"class {name}: has boxes in {here} and none in {there}"))
    return faults


def _used(data: DetectionDataset) -> set[str]:
    labels = np.unique(data.annotations.labels[~data.annotations.crowd])
    return {data.classes[label - 1] for label in labels.tolist()}


def _of_boxes(data: DetectionDataset, rule: str, rows: np.ndarray, why: Callable[[int], str]) -> list[Fault]:
    known = data.annotations
    faults = []
    for row in rows.tolist():
        path = data.images / data.file_name(known.images[row])
        box = tuple(known.boxes[row].tolist())
        shown = ", ".join(f"{side:.6g}" for side in box)
        text = f"{path}: box [{shown}] of {data.classes[known.labels[row] - 1]} {why(row)}"
        faults.append(Fault(rule, text, path, box, data.sizes[known.images[row]]))
    return faults


def _size(data: DetectionDataset, row: int) -> str:
    height, width = data.sizes[data.annotations.images[row]]
    return f"which is {width}x{height}"
