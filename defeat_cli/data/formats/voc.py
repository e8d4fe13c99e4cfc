"""PASCAL VOC: its folder layout read as COCO content, and its own average precision."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from defeat_cli.errors import DataError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IMAGE_SETS = "ImageSets/Main"


class ImageSet(NamedTuple):
    """One list of images: `folder/ImageSets/Main/name.txt`, with `folder/JPEGImages` and `folder/Annotations`."""

    folder: Path
    name: str

    @property
    def file(self) -> Path:
        return self.folder / IMAGE_SETS / f"{self.name}.txt"


def is_voc(path: Path) -> bool:
    """Whether a folder is in VOC's layout, or one in it is."""
    return _has_layout(path) or bool(_years(path))


def find_image_sets(path: Path, split: str, named: str | None = None) -> list[ImageSet]:
    """The image sets that make up a split.

    Args:
        path: a folder in VOC's layout, or one that holds such folders, like `VOCdevkit`.
        split: `train` or `val`: the sets of those names, where `named` is None.
        named: one set or several, e.g. `trainval`, or `VOC2007/trainval+VOC2012/trainval`.

    Raises:
        DataError: no VOC layout, or no such image set; lists those that are there.
    """
    image_sets = []
    for part in (named or split).split("+"):
        folder, _, name = part.strip().rpartition("/")
        image_sets.append(ImageSet(path / folder, name))
    for folder, name in image_sets:
        if not _has_layout(folder):
            years = _years(path)
            hint = f"; name image sets in its folders, e.g. {years[0]}/{name}" if years else ""
            raise DataError(f"{folder}: not in VOC's layout (JPEGImages, Annotations, {IMAGE_SETS}){hint}")
        if not (folder / IMAGE_SETS / f"{name}.txt").is_file():
            there = sorted(file.stem for file in (folder / IMAGE_SETS).glob("*.txt"))
            listed = ", ".join(there[:10]) + (", …" if len(there) > 10 else "")
            raise DataError(f"{folder / IMAGE_SETS}: no image set {name}; there are: {listed or 'none'}")
    return image_sets


def read_voc(path: Path, image_sets: list[ImageSet]) -> dict[str, Any]:
    """Image sets as content of a COCO file, with file names relative to `path`.

    Boxes become 0-based and end-exclusive. `difficult` objects become crowds: left out of training (as by mmdetection,
    which the paper used) and ignored by COCO's evaluation; `voc_ap50` ignores them as VOC does. The classes are VOC's
    20 where these cover the objects, else the names in all annotation files of the folders.

    Raises:
        DataError: an annotation file that is missing, is no XML (with the line), or lacks a key.
    """
    images, objects = [], []
    for image_set in image_sets:
        pictures = image_set.folder / "JPEGImages"
        file_of = {file.stem: file.name for file in pictures.iterdir()}  # most are .jpg, but not everybody's
        for name in _listed(image_set.file):
            file = image_set.folder / "Annotations" / f"{name}.xml"
            root = _parse(file)
            picture = (pictures / file_of.get(name, f"{name}.jpg")).relative_to(path)
            images.append({"id": len(images) + 1, "file_name": picture.as_posix(), **_size(root)})
            objects.extend((len(images), *_object(element, file)) for element in root.iter("object"))
    classes = _classes({name for _, name, _, _ in objects}, image_sets)
    ids = {name: i for i, name in enumerate(classes, start=1)}
    return {
        "images": images,
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
        "annotations": [
            {"id": i, "image_id": image_id, "category_id": ids[name], "bbox": box, "iscrowd": difficult}
            for i, (image_id, name, box, difficult) in enumerate(objects, start=1)
        ],
    }


def voc_ap50(
    detections: list[dict[str, Any]], ground_truth: dict[str, Any], eleven_points: bool = False
) -> dict[str, Any]:
    """VOC's average precision at IoU 0.5.

    A detection belongs to the box of its class and image that it overlaps most. It is right if IoU is at least 0.5 and
    no better-scored one took that box; if that box is difficult it does not count at all; else it is wrong.

    Args:
        detections: COCO results: `image_id`, `category_id`, `bbox` [x, y, width, height], `score`.
        ground_truth: COCO content; boxes with `iscrowd` are difficult ones.
        eleven_points: VOC2007's mean of precision at recall 0, 0.1, ..., 1; else the area under the curve (VOC2010 on).

    Returns:
        `AP50`, the mean over classes that have boxes, and `per_class`: name -> AP; fractions 0-1, -1 without boxes.
    """
    boxes = defaultdict(lambda: defaultdict(list))
    for annotation in ground_truth["annotations"]:
        boxes[annotation["category_id"]][annotation["image_id"]].append(
            (*annotation["bbox"], bool(annotation.get("iscrowd", 0)))
        )
    found = defaultdict(list)
    for detection in detections:
        found[detection["category_id"]].append(detection)
    per_class = {
        category["name"]: _class_ap(found[category["id"]], boxes[category["id"]], eleven_points)
        for category in sorted(ground_truth["categories"], key=lambda category: category["id"])
    }
    scored = [ap for ap in per_class.values() if ap >= 0]
    return {"AP50": float(np.mean(scored)) if scored else -1.0, "per_class": per_class}


def average_precision(correct: np.ndarray, positives: int, eleven_points: bool) -> float:
    """AP of detections in falling order of score.

    Args:
        correct: [D] bool.
        positives: number of boxes to be found, at least 1.
    """
    hits = np.cumsum(correct)
    recall = hits / positives
    precision = hits / np.arange(1, len(hits) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    if eleven_points:
        first = np.searchsorted(recall, np.arange(11) / 10 - 1e-12)
        return float(np.append(best_from_here, 0.0)[first].mean())
    return float((np.diff(recall, prepend=0.0) * best_from_here).sum())


def _class_ap(detections: list[dict[str, Any]], boxes: dict[Any, list[tuple]], eleven_points: bool) -> float:
    truth = {image_id: np.array(rows, dtype=np.float64) for image_id, rows in boxes.items()}
    positives = int(sum((rows[:, 4] == 0).sum() for rows in truth.values()))
    if not positives:
        return -1.0
    taken = {image_id: np.zeros(len(rows), dtype=bool) for image_id, rows in truth.items()}
    correct = []
    for detection in sorted(detections, key=lambda detection: -detection["score"]):
        image_id = detection["image_id"]
        hit = False
        if image_id in truth:
            overlaps = _iou(np.array(detection["bbox"], dtype=np.float64), truth[image_id])
            best = int(overlaps.argmax())
            if overlaps[best] >= 0.5:
                if truth[image_id][best, 4]:
                    continue
                hit = not taken[image_id][best]
                taken[image_id][best] = True
        correct.append(hit)
    return average_precision(np.array(correct, dtype=bool), positives, eleven_points)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of one xywh box with each of [M, 4+]."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:4])
    shared = (high - low).clip(min=0).prod(axis=1)
    return shared / np.maximum(box[2:].prod() + others[:, 2:4].prod(axis=1) - shared, 1e-12)


def _has_layout(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in ("JPEGImages", "Annotations", IMAGE_SETS))


def _years(path: Path) -> list[str]:
    """Names of the folders in VOC's layout inside one, like VOC2007."""
    return sorted(child.name for child in path.iterdir() if _has_layout(child)) if path.is_dir() else []


def _listed(file: Path) -> list[str]:
    """Image names of a set. A class's own set has a second column, which says where the class is; it is not needed."""
    return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parse(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except FileNotFoundError:
        raise DataError(f"{file}: is listed in an image set, but is not there") from None
    except ElementTree.ParseError as error:
        raise DataError(f"{file}:{error.position[0]}: not valid XML: {error}") from None


def _size(root: ElementTree.Element) -> dict[str, int]:
    """Width and height where the file gives them; some tools write 0, which counts as missing."""
    sides = {key: root.findtext(f"size/{key}") or "0" for key in ("width", "height")}
    return {key: int(side) for key, side in sides.items() if side.strip().isdigit()}


def _object(element: ElementTree.Element, file: Path) -> tuple[str, list[float], int]:
    """Name, box [x, y, width, height] and whether it is difficult."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise DataError(f"{file}: an object has no name")
    try:
        x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{key}") or "") for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise DataError(f"{file}: object {name}: bndbox must hold the numbers xmin, ymin, xmax, ymax") from None
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return name, [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], int(difficult)


def _classes(used: set[str], image_sets: list[ImageSet]) -> list[str]:
    if used <= set(CLASSES):
        return list(CLASSES)
    folders = {image_set.folder / "Annotations" for image_set in image_sets}
    roots = (_parse(file) for folder in folders for file in folder.glob("*.xml"))
    return sorted(
        {name.strip() for root in roots for name in (e.findtext("name") for e in root.iter("object")) if name}
    )
