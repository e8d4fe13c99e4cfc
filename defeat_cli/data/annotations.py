"""What is annotated of a set of images, as checked arrays; and COCO's JSON files read into them."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from defeat_cli.data.faults import EntryError, Fault, Faults
from defeat_cli.data.reading import read_json, stream_json
from defeat_cli.errors import DataError

Id = int | str
KEYS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Annotations:
    """Images with boxes. N images, A annotations, K categories.

    origin: the file or folder, for messages.
    classes, category_ids: K names and ids, ordered by id; label `i + 1` is `classes[i]`.
    image_ids, file_names: N, in the file's order.
    sizes: N (height, width), None where nothing says.
    images, labels: [A] int64, position of the image, and label in 1..K.
    boxes: [A, 4] float64 x, y, width, height in pixels, just as in the file.
    areas: [A] float64; the box's own area where the file does not say.
    crowd: [A] bool.
    notes: what a user should know about how this was read.
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
    notes: tuple[str, ...] = ()

    def placed(self, file_names: list[str], notes: Sequence[str]) -> Annotations:
        """The same with the names that the image files really have, and what there is to say about them."""
        return replace(self, file_names=file_names, notes=(*self.notes, *notes))

    def with_sizes(self, sizes: list[tuple[int, int] | None]) -> Annotations:
        """The same with these (height, width)."""
        return replace(self, sizes=sizes)

    def of_images(self, chosen: np.ndarray, note: str | None = None) -> Annotations:
        """Some of the images, with their boxes.

        Args:
            chosen: [n] positions, ascending.
            note: what to say about it.
        """
        place = np.full(len(self.file_names), -1)
        place[chosen] = np.arange(len(chosen))
        rows = np.flatnonzero(place[self.images] >= 0)
        return replace(
            self,
            image_ids=[self.image_ids[i] for i in chosen],
            file_names=[self.file_names[i] for i in chosen],
            sizes=[self.sizes[i] for i in chosen],
            notes=self.notes if note is None else (*self.notes, note),
            **self.columns(rows, images=place[self.images[rows]]),
        )

    def without_images(self, gone: Sequence[int]) -> Annotations:
        """The same without the images at these positions."""
        if not len(gone):
            return self
        return self.of_images(np.setdiff1d(np.arange(len(self.file_names)), gone))

    def columns(self, rows: np.ndarray, **changed: np.ndarray) -> dict[str, np.ndarray]:
        """What is known of some of the annotations, with columns that change."""
        names = ("images", "labels", "boxes", "areas", "crowd")
        return {name: getattr(self, name)[rows] for name in names} | changed


def from_objects(
    origin: str,
    categories: dict[int, str],
    images: Sequence[tuple[str, tuple[int, int] | None]],
    objects: Sequence[tuple[int, int, Sequence[float], bool]],
    notes: Sequence[str] = (),
) -> Annotations:
    """Annotations of a format that has no ids of its own: images are numbered from 1.

    Args:
        categories: id -> class name.
        images: file name and (height, width) of each.
        objects: position of the image, category id, box [x, y, width, height] in pixels, whether it is a crowd.
    """
    ids = sorted(categories)
    label_of = {category_id: label for label, category_id in enumerate(ids, start=1)}
    boxes = np.array([box for _, _, box, _ in objects], dtype=np.float64).reshape(-1, 4)
    return Annotations(
        origin=origin,
        classes=[categories[i] for i in ids],
        category_ids=list(ids),
        image_ids=list(range(1, len(images) + 1)),
        file_names=[name for name, _ in images],
        sizes=[size for _, size in images],
        images=np.array([image for image, _, _, _ in objects], dtype=np.int64),
        labels=np.array([label_of[category] for _, category, _, _ in objects], dtype=np.int64),
        boxes=boxes,
        areas=_own_areas(boxes),
        crowd=np.array([crowd for _, _, _, crowd in objects], dtype=bool),
        notes=tuple(notes),
    )


def read_annotations(path: Path, faults: Faults | None = None) -> Annotations:
    """Read a COCO annotation file.

    Args:
        faults: is told of entries at fault, which are left out where it tolerates them.

    Raises:
        DataError: it is no JSON (with the line), or not what COCO annotations are (with the entry at fault).
    """
    faults = faults or Faults()
    told = len(faults.found)
    reader = _CocoReader(str(path), faults)
    content = stream_json(path, reader.take)
    if content is not None:
        return reader.finish(content)
    del faults.found[told:]  # all of them are told again
    return parse_annotations(read_json(path), str(path), faults)


def parse_annotations(content: Any, origin: str, faults: Faults | None = None) -> Annotations:
    """Check a COCO file's content and turn it into arrays.

    What is of another type and still clear is read: 1.0 and "1" as 1, "0" as no crowd.

    Args:
        origin: what messages call it.
        faults: as in `read_annotations`.

    Raises:
        DataError: names the entry at fault.
    """
    reader = _CocoReader(origin, faults or Faults())
    if isinstance(content, dict):
        content = {
            key: [reader.take(key, i, entry) for i, entry in enumerate(value)] if isinstance(value, list) else value
            for key, value in content.items()
        }
    return reader.finish(content)


class _CocoReader:
    """Takes the entries of a COCO file one by one, in whatever order its lists come, then joins them.

    An annotation names its image and category by ids that may come later in the file. Until then both are numbered in
    the order in which annotations first name them.
    """

    def __init__(self, origin: str, faults: Faults) -> None:
        self.origin = origin
        self.faults = faults
        self.dropped: list[int] = []
        self.ids: list[Any] = []
        self.image_keys: dict[Id, int] = {}
        self.category_keys: dict[Id, int] = {}
        self.images, self.categories = array("q"), array("q")
        self.numbers = array("d")
        self.crowd = bytearray()
        self.parsers: dict[str, Callable[[dict], Any]] = {
            "images": _image, "categories": _category, "annotations": self._annotation
        }  # fmt: skip

    def take(self, key: str, position: int, row: Any) -> Any:
        """An entry of the list `key`, checked; None where it is at fault, and for annotations, which are kept apart."""
        parse = self.parsers.get(key)
        if parse is None:
            return None
        try:
            if not isinstance(row, dict):
                raise EntryError(f"is {kind_of(row)}, not a mapping of keys to values")
            return parse(row)
        except EntryError as error:
            fault = error
            named = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
            text = f"{self.origin}: {key}[{position}]{named}: {fault}{_near_miss(row)}"
        self.faults.tell(Fault(fault.rule, text))
        if key == "annotations":
            self.dropped.append(position)
        return None

    def finish(self, content: Any) -> Annotations:
        """Everything taken, joined; `content` is the file's with checked entries in its lists."""
        if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in KEYS):
            raise DataError(f"{self.origin}: not COCO annotations: needs lists {', '.join(KEYS)}; {_found(content)}")
        lists = {}
        for key in ("images", "categories"):
            if not content[key]:
                raise DataError(f"{self.origin}: {key} is empty")
            lists[key] = rows = self._unique([row for row in content[key] if row is not None], 0, f"{key}: id")
            if not rows:
                raise DataError(f"{self.origin}: {key} has no entry that can be read")
            if len({type(row[0]) for row in rows}) > 1:
                raise DataError(f"{self.origin}: {key}: ids are numbers here and text there; use one of them")
        images, categories = lists["images"], sorted(lists["categories"], key=lambda row: _in_order(row[0]))
        image_of = self._places(self.image_keys, [row[0] for row in images], self.images, "image_id", "images")
        category_ids = [row[0] for row in categories]
        category_of = self._places(
            self.category_keys, category_ids, self.categories, "category_id", "categories"
        )  # fmt: skip
        shown = image_of[np.frombuffer(self.images, dtype=np.int64)]
        used = category_of[np.frombuffer(self.categories, dtype=np.int64)]
        known = (shown >= 0) & (used >= 0)
        crowd = np.frombuffer(self.crowd, dtype=np.uint8).astype(bool)
        numbers = np.frombuffer(self.numbers, dtype=np.float64).reshape(-1, 5)
        if not known.all():
            shown, used, crowd, numbers = shown[known], used[known], crowd[known], numbers[known]
        self._tell_duplicate_ids()
        categories, used, notes = _without_parent(categories, used)
        self._unique(categories, 1, "categories: name")
        boxes, areas = numbers[:, :4].copy(), numbers[:, 4]
        return Annotations(
            origin=self.origin,
            classes=[row[1] for row in categories],
            category_ids=[row[0] for row in categories],
            image_ids=[row[0] for row in images],
            file_names=[row[1] for row in images],
            sizes=[row[2] for row in images],
            images=shown,
            labels=used + 1,
            boxes=boxes,
            areas=np.where(np.isnan(areas), _own_areas(boxes), areas),
            crowd=crowd,
            notes=notes,
        )

    def _annotation(self, row: dict) -> None:
        """Checked and packed at once: a file's polygons need many times the memory of its boxes."""
        image, category = row.get("image_id"), row.get("category_id")
        if type(image) is not int or type(category) is not int:
            image, category = _id(row, "image_id"), _id(row, "category_id")
        box = row.get("bbox")
        if type(box) is not list or len(box) != 4:
            found = f"found {_shown(box)}" if "bbox" in row else "there is none"
            raise EntryError(f"bbox must be four numbers, [x, y, width, height]; {found}", "numbers")
        x, y, width, height = box
        if not (type(x) is type(y) is type(width) is type(height) is float and math.isfinite(x + y + width + height)):
            x, y, width, height = box = [_number(side) for side in box]
            if None in box:
                found = _shown(row["bbox"])
                text = f"bbox must be four finite numbers, [x, y, width, height]; found {found}"
                raise EntryError(text, "numbers")
        area = row.get("area")
        if area is None:
            area = math.nan
        elif (area := _number(area)) is None:
            raise EntryError(f"area must be a number, found {_shown(row['area'])}")
        crowd = row.get("iscrowd")
        if crowd not in (0, 1, None, "0", "1"):
            raise EntryError(f"iscrowd must be 0 or 1, found {_shown(crowd)}")
        self.ids.append(row.get("id"))
        self.images.append(self.image_keys.setdefault(image, len(self.image_keys)))
        self.categories.append(self.category_keys.setdefault(category, len(self.category_keys)))
        self.numbers.extend((x, y, width, height, area))
        self.crowd.append(int(crowd or 0))

    def _places(self, keys: dict[Id, int], ids: list[Id], used: array, key: str, what: str) -> np.ndarray:
        """Number in the order of first use -> position of that id in a list of the file; -1 where it is not there."""
        place_of = {identity: place for place, identity in enumerate(ids)}
        places = np.empty(len(keys), dtype=np.int64)
        rule = {"images": "unknown image", "categories": "unknown category"}[what]
        for identity, number in keys.items():
            place = place_of.get(identity, place_of.get(_other_form(identity)))
            places[number] = -1 if place is None else place
            if place is None:
                rows = np.flatnonzero(np.frombuffer(used, dtype=np.int64) == number).tolist()
                text = f"{key} {identity!r} is not the id of one of its {what}"
                self.faults.tell([Fault(rule, f"{self._named(row)}: {text}") for row in rows])
        return places

    def _named(self, row: int) -> str:
        """The annotation that was taken as number `row`, as messages call it: by its place in the file."""
        named = "" if self.ids[row] is None else f" (id {self.ids[row]})"
        for position in self.dropped:
            row += position <= row
        return f"{self.origin}: annotations[{row}]{named}"

    def _unique(self, rows: list[tuple], column: int, what: str) -> list[tuple]:
        """Rows without those that repeat what an earlier one has in a column."""
        kept, seen = [], set()
        for row in rows:
            if row[column] in seen:
                text = f"{self.origin}: {what} {row[column]!r} is there more than once"
                self.faults.tell(Fault("duplicate id", text))
            else:
                seen.add(row[column])
                kept.append(row)
        return kept

    def _tell_duplicate_ids(self) -> None:
        """Annotation ids are not used, so that repeated ones do no harm here; elsewhere they do."""
        if "duplicate annotation id" not in self.faults.tolerated:
            return
        seen: set[Id] = set()
        for row, identity in enumerate(self.ids):
            if isinstance(identity, Id) and identity in seen:
                text = f"{self._named(row)}: an earlier annotation has this id too"
                self.faults.tell(Fault("duplicate annotation id", text))
            elif isinstance(identity, Id):
                seen.add(identity)


def _image(row: dict) -> tuple[Id, str, tuple[int, int] | None]:
    sides = []
    for key in ("height", "width"):
        side = 0 if row.get(key) is None else _number(row[key])
        if side is None or side != int(side):
            raise EntryError(f"{key} must be a number of pixels, found {_shown(row[key])}")
        sides.append(int(side))
    return _id(row, "id"), _text(row, "file_name"), (sides[0], sides[1]) if min(sides) > 0 else None


def _category(row: dict) -> tuple[Id, str, Any]:
    """Id, name and parent."""
    name = row.get("name")
    if type(name) is int:  # a class of digits
        row = {**row, "name": str(name)}
    return _id(row, "id"), _text(row, "name"), row.get("supercategory")


def _without_parent(
    categories: list[tuple[Id, str, Any]], used: np.ndarray
) -> tuple[list[tuple[Id, str, Any]], np.ndarray, tuple[str, ...]]:
    """Without the category that Roboflow puts above all others: their parent, which no annotation is of.

    Returns:
        Categories, [A] the position of each annotation's among them, and a note on what was dropped.
    """
    for place, (category_id, name, _) in enumerate(categories):
        others = categories[:place] + categories[place + 1 :]
        if others and all(parent == name for _, _, parent in others) and place not in used:
            note = f"category {name!r} (id {category_id}) is the parent of all others and has no box: left out"
            return others, used - (used > place), (note,)
    return categories, used, ()


def _own_areas(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 2:].clip(min=0).prod(axis=1)


def _number(value: Any) -> float | None:
    """A finite number, or text that is one; else None."""
    kind = type(value)
    try:
        if kind is float or kind is int or kind is str:
            value = float(value)
            return value if math.isfinite(value) else None
    except (ValueError, OverflowError):
        pass
    return None


def _id(row: dict, key: str) -> Id:
    value = row.get(key)
    kind = type(value)
    if kind is int or kind is str:
        return value
    if kind is float and value.is_integer():
        return int(value)
    raise EntryError(f"{key} must be a number, found {_shown(value)}" if key in row else f"{key} is missing")


def _other_form(identity: Id) -> Id | None:
    """7 for "7" and the other way round: annotations often write ids otherwise than images do."""
    if isinstance(identity, int):
        return str(identity)
    return int(identity) if re.fullmatch(r"0|[1-9][0-9]{0,99}", identity) else None


def _in_order(identity: Id) -> tuple[bool, Id]:
    """Sorts numbers first, then text."""
    return isinstance(identity, str), identity


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise EntryError(f"{key} must be text, found {_shown(value)}" if key in row else f"{key} is missing")
    return value


def kind_of(value: Any) -> str:
    """What a value from JSON or YAML is, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return "a number"
    return {dict: "a mapping", list: "a list", str: "text"}.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _found(content: Any) -> str:
    """What a file holds in place of COCO annotations."""
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        if {"image_id", "score"} <= first.keys():
            return "found a list of detections: these are results, not annotations"
        return "found a list"
    if not isinstance(content, dict):
        return f"found {kind_of(content)}"
    keys = [
        key if key not in KEYS or isinstance(content[key], list) else f"{key} ({kind_of(content[key])})"
        for key in content
    ]
    looks = ""
    if "shapes" in content and "imagePath" in content:
        looks = "; this looks like a LabelMe file, one for each image: export COCO or VOC"
    elif any(key.startswith("_via") for key in content):
        looks = "; this looks like a VIA project: export it as COCO"
    return f"found {', '.join(keys[:10]) or 'no keys'}{', …' if len(keys) > 10 else ''}{looks}"


def _near_miss(row: Any) -> str:
    """What kind of COCO file holds entries like this one, where it is one without boxes."""
    if isinstance(row, dict) and "caption" in row:
        return "; these are captions, boxes are in the instances files"
    if isinstance(row, dict) and "segments_info" in row:
        return "; these are panoptic segments, boxes are in the instances files"
    return ""
