"""COCO annotation files as checked arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from defeat_cli.errors import DataError

Id = int | str
KEYS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Annotations:
    """What a COCO file says. N images, A annotations, K categories.

    origin: the file, for messages.
    classes, category_ids: K names and ids, ordered by id; label `i + 1` is `classes[i]`.
    image_ids, file_names: N, in the file's order.
    sizes: N (height, width), None where the file does not say.
    images, labels: [A] int64, position of the image, and label in 1..K.
    boxes: [A, 4] float64 x, y, width, height in pixels, just as in the file.
    areas: [A] float64; the box's own area where the file does not say.
    crowd: [A] bool.
    """

    origin: str
    classes: list[str]
    category_ids: list[Id]
    image_ids: list[Id]
    file_names: list[str]
    sizes: list[tuple[int, int] | None]
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


def read_annotations(path: Path) -> Annotations:
    """Read a COCO annotation file.

    Raises:
        DataError: it is no JSON (with the line), or not what COCO annotations are (with the entry at fault).
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid JSON: not text in UTF-8 ({error.reason})") from None
    return parse_annotations(content, str(path))


def parse_annotations(content: Any, origin: str) -> Annotations:
    """Check a COCO file's content and turn it into arrays.

    Args:
        origin: what messages call it.

    Raises:
        DataError: names the entry at fault.
    """
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in KEYS):
        found = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(f"{origin}: not COCO annotations: needs lists {', '.join(KEYS)}; found {found or 'no keys'}")
    categories, images = content["categories"], content["images"]
    category_ids = _checked(categories, _category, origin, "categories")
    image_rows = _checked(images, _image, origin, "images")
    for key, rows in (("images", image_rows), ("categories", category_ids)):
        if not rows:
            raise DataError(f"{origin}: {key} is empty")
        _refuse_duplicates([row[0] for row in rows], f"{origin}: {key}: id")
        if len({type(row[0]) for row in rows}) > 1:
            raise DataError(f"{origin}: {key}: ids are numbers here and text there; use one of them")
    category_ids.sort()
    _refuse_duplicates([name for _, name in category_ids], f"{origin}: categories: name")
    image_of = {row[0]: i for i, row in enumerate(image_rows)}
    label_of = {category_id: label for label, (category_id, _) in enumerate(category_ids, start=1)}
    rows = _checked(content["annotations"], lambda row: _annotation(row, image_of, label_of), origin, "annotations")
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(5)]
    boxes = np.array(columns[2], dtype=np.float64).reshape(-1, 4)
    broken = np.flatnonzero(~np.isfinite(boxes).all(axis=1))
    if broken.size:
        raise DataError(f"{origin}: annotations[{broken[0]}]: bbox {boxes[broken[0]].tolist()} is not finite")
    areas = np.array([np.nan if area is None else area for area in columns[3]], dtype=np.float64)
    return Annotations(
        origin=origin,
        classes=[name for _, name in category_ids],
        category_ids=[category_id for category_id, _ in category_ids],
        image_ids=[row[0] for row in image_rows],
        file_names=[row[1] for row in image_rows],
        sizes=[row[2] for row in image_rows],
        images=np.array(columns[0], dtype=np.int64),
        labels=np.array(columns[1], dtype=np.int64),
        boxes=boxes,
        areas=np.where(np.isnan(areas), boxes[:, 2:].clip(min=0).prod(axis=1), areas),
        crowd=np.array(columns[4], dtype=bool),
    )


class _FaultError(Exception):
    """What is wrong with one entry; `_checked` adds where it is."""


def _checked(rows: list[Any], parse: Callable[[dict], tuple], origin: str, key: str) -> list[tuple]:
    """Every entry parsed; the first that cannot be is named."""
    parsed = []
    for i, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise _FaultError(f"is a {type(row).__name__}, not an object with keys")
            parsed.append(parse(row))
        except _FaultError as fault:
            named = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
            raise DataError(f"{origin}: {key}[{i}]{named}: {fault}") from None
    return parsed


def _category(row: dict) -> tuple[Id, str]:
    return _id(row, "id"), _text(row, "name")


def _image(row: dict) -> tuple[Id, str, tuple[int, int] | None]:
    sides = [row.get(key) for key in ("height", "width")]
    if any(side is not None and not _is_number(side) for side in sides):
        raise _FaultError(f"height and width must be numbers of pixels, found {sides[0]!r} and {sides[1]!r}")
    size = (int(sides[0]), int(sides[1])) if all(side is not None and side > 0 for side in sides) else None
    return _id(row, "id"), _text(row, "file_name"), size


def _annotation(row: dict, image_of: dict[Id, int], label_of: dict[Id, int]) -> tuple:
    image, label = image_of.get(_id(row, "image_id")), label_of.get(_id(row, "category_id"))
    if image is None:
        raise _FaultError(f"image_id {row['image_id']!r} is not the id of one of its images")
    if label is None:
        raise _FaultError(f"category_id {row['category_id']!r} is not the id of one of its categories")
    box, area = row.get("bbox"), row.get("area")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        found = f"found {box!r}" if "bbox" in row else "there is none"
        raise _FaultError(f"bbox must be four numbers, [x, y, width, height]; {found}")
    if area is not None and not _is_number(area):
        raise _FaultError(f"area must be a number, found {area!r}")
    return image, label, box, area, bool(row.get("iscrowd", 0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _id(row: dict, key: str) -> Id:
    value = row.get(key)
    if not isinstance(value, int | str):
        raise _FaultError(f"{key} must be a number, found {value!r}" if key in row else f"{key} is missing")
    return value


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise _FaultError(f"{key} must be text, found {value!r}" if key in row else f"{key} is missing")
    return value


def _refuse_duplicates(values: list[Any], what: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise DataError(f"{what} {value!r} is there more than once")
        seen.add(value)
