"""From a folder to a data set: which layout it is in, and what is wrong where it is in none."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.faults import IMAGE_RULES, Faults
from defeat_cli.data.formats import FORMATS
from defeat_cli.data.formats.splits import NAMES
from defeat_cli.data.images import SUFFIXES
from defeat_cli.data.selection import divide, keep_classes
from defeat_cli.data.transforms import RandomFlip
from defeat_cli.errors import DataError
from defeat_cli.text import listed

SPOKEN = {"train": "training", "val": "validation", "test": "test", "all": "data set's"}
"""What messages call a split's images."""
FOREIGN = {
    ".csv": "CSV files (as of TensorFlow or RetinaNet exports)",
    ".tfrecord": "TFRecords",
    ".parquet": "Parquet tables",
    ".zip": "an archive that is not unpacked",
}
"""Kinds of files that hold annotations which are not read."""


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
    val_fraction: float | None = None,
    split_seed: int = 0,
    classes: Sequence[str] | None = None,
    faults: Faults | None = None,
) -> DetectionDataset:
    """One split of a data set in any of the layouts.

    Args:
        path: folder, or a COCO file.
        split: `train`, `val` or `test`; `all` for what is not divided.
        format: a key of `FORMATS`, or `auto` to see from the folder.
        annotations, images: what the user names, relative to `path`; see the layouts' `read`. Where `val_fraction` is
            given, those of the training data for both.
        train: whether notes speak of training, and images are flipped.
        flip: chance of a horizontal flip.
        seed: of the flips.
        val_fraction: share of the training images that is set apart for validation; None takes the layout's own.
        split_seed: decides which images these are.
        classes: names to keep; None keeps all.
        faults: is told of what is wrong; what it tolerates is left out.

    Raises:
        NoSplitError: no such split there.
        DataError: no data there, or data that cannot be used.
    """
    faults = faults or Faults()
    if split not in NAMES and split != "all":
        raise DataError(f"no split {split!r}; use {', '.join(NAMES)}")
    path = Path(path)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such folder")
    name, path, notes = _recognised(path, format, annotations)
    divided = val_fraction is not None and split in ("train", "val")
    content, folder = FORMATS[name].read(path, "all" if divided else split, annotations, images, faults)
    if divided:
        content = divide(content, split, val_fraction, split_seed)
    if classes is not None:
        content = keep_classes(content, classes)
    transforms = [RandomFlip(flip)] if train and flip else []
    dataset = DetectionDataset(content, folder, train, transforms, seed, layout=name, faults=faults)
    dataset.refuse_boxless(SPOKEN[split], faults)
    dataset.opening = notes
    dataset.left_out = [fault for fault in faults.found if fault.rule in IMAGE_RULES]
    return dataset


def _recognised(path: Path, format: str, annotations: str | None) -> tuple[str, Path, list[str]]:
    """Layout, the folder in it (the given one, or the only one inside that is in a layout), and notes.

    Raises:
        DataError: no layout, or more than one folder.
    """
    if format != "auto":
        return format, path, []
    if path.is_file() and path.suffix.lower() != ".json":
        raise DataError(f"{path}: data is a folder, or a COCO file in JSON; for a data.yaml give the folder it is in")
    if path.is_file() or (annotations is not None and annotations.endswith(".json")):
        return "coco", path, []
    found, notes = _layouts(path), []
    if not found:
        inner = {child: _layouts(child) for child in sorted(path.iterdir()) if child.is_dir()}
        inner = {child: names for child, names in inner.items() if names}
        if len(inner) != 1:
            raise DataError(_unknown(path, list(inner)))
        ((path, found),) = inner.items()
        notes = [f"{path}: taken, the only folder with data in the one given"]
    if found[1:]:
        notes.append(f"{path}: read as {found[0]}; it is also like {', '.join(found[1:])}, which data.format chooses")
    return found[0], path, notes


def _layouts(path: Path) -> list[str]:
    return [name for name, layout in FORMATS.items() if layout.matches(path)]


def _unknown(path: Path, inner: Sequence[Path]) -> str:
    """What was looked for, what was found, and what to do."""
    found, kinds = [], Counter()
    for parent, folders, files in os.walk(path):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))[:20]
        for file in sorted(files):
            kind = os.path.splitext(file)[1].lower()
            if kinds[kind] < 1:
                found.append(os.path.relpath(os.path.join(parent, file), path))
            kinds[kind] += 1
        if sum(kinds.values()) > 10_000:
            break
    counts = ", ".join(f"{count} {kind or 'without suffix'}" for kind, count in kinds.most_common(6)) or "no files"
    lines = [
        f"{path}: data in a layout that is not known. Looked for",
        "COCO: annotations/instances_train2017.json with train2017, train.json with images, or "
        "train/_annotations.coco.json",
        "VOC: JPEGImages, Annotations and ImageSets/Main, or XML files beside images",
        "YOLO: data.yaml with images and labels",
        f"Found {counts}{f' (e.g. {listed(found, 4)})' if found else ''}{_looks_like(path, kinds, found)}",
    ]
    if inner:
        lines.append(f"Folders inside are in a layout: name one of {listed([str(child) for child in inner], 4)}")
    else:
        lines.append(
            "Where files are called otherwise: --set data.train_annotations=FILE --set data.train_images=FOLDER"
        )
    return "\n  ".join(lines)


def _looks_like(path: Path, kinds: Counter, found: Sequence[str]) -> str:
    """The near miss of a layout, in words."""
    has = {name: (path / name).is_dir() for name in ("JPEGImages", "Annotations", "labels", "images")}
    first_json = next((path / name for name in found if name.endswith(".json")), None)
    if has["JPEGImages"] != has["Annotations"]:
        there, missing = sorted(("JPEGImages", "Annotations"), key=lambda name: not has[name])
        return f"; looks like VOC's layout without {missing} beside {there}"
    if has["labels"] and kinds[".txt"]:
        return "; looks like YOLO's layout, but no data.yaml or classes.txt names the classes"
    if first_json is not None:
        return f"; {_json_kind(first_json)}"
    for suffix, what in FOREIGN.items():
        if kinds[suffix]:
            return f"; looks like {what}: export COCO, VOC or YOLO instead"
    if kinds and set(kinds) <= SUFFIXES:
        return "; these are images without annotations"
    return ""


def _json_kind(file: Path) -> str:
    """What a JSON file that is not COCO's seems to be."""
    try:
        content = json.loads(file.read_bytes()) if file.stat().st_size < 50_000_000 else None
    except (OSError, ValueError, RecursionError):
        return f"{file.name} is not JSON that can be read"
    first = content[0] if isinstance(content, list) and content else content
    keys = set(first) if isinstance(first, dict) else set()
    if {"shapes", "imagePath"} <= keys:
        return "looks like LabelMe's files, one for each image: export COCO, VOC or YOLO instead"
    if {"image", "annotations"} <= keys:
        return "looks like CreateML's JSON: export COCO, VOC or YOLO instead"
    if any(key.startswith("_via") for key in keys):
        return "looks like a VIA project: export it as COCO"
    if "data" in keys and keys & {"annotations", "predictions"}:
        return "looks like Label Studio's own JSON: export COCO, VOC or YOLO instead"
    return f"{file.name} holds no lists images, annotations and categories"
