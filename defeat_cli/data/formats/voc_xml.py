"""One annotation file of PASCAL VOC's kind, as many labelling tools write it."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from defeat_cli.data.annotations import Annotations, from_objects
from defeat_cli.data.faults import EntryError, Fault, Faults
from defeat_cli.data.images import FileIndex, nearest, parts_of
from defeat_cli.data.reading import decoded, read_bytes
from defeat_cli.errors import DataError
from defeat_cli.text import listed

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CORNERS = ("xmin", "ymin", "xmax", "ymax")
DIFFICULT = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
DECLARED = re.compile(r"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["'][^>]*?\?>""")


class Object(NamedTuple):
    """box: [x, y, width, height] in pixels, 0-based and end-exclusive, where VOC's are 1-based and end-inclusive."""

    name: str
    box: list[float]
    difficult: bool


class Page(NamedTuple):
    """What one annotation file says. filename: of its image; size: (height, width); each None where it does not say."""

    file: Path
    filename: str | None
    size: tuple[int, int] | None
    objects: list[Object]


def read_page(file: Path, faults: Faults) -> Page | None:
    """Read an annotation file.

    Args:
        faults: is told where it cannot be read, is no XML (with the line), is of another kind, or lacks a key.

    Returns:
        What it says; None where it cannot be read at all.
    """
    try:
        root = _root(file)
    except DataError as error:
        faults.tell(Fault("entry", str(error)))
        return None
    filename = (root.findtext("filename") or "").strip() or None
    objects = []
    for element in root.findall("object"):
        try:
            objects.append(_object(element))
        except EntryError as fault:
            faults.tell(Fault(fault.rule, f"{file}: {fault}"))
    return Page(file, filename, _size(root), objects)


def _root(file: Path) -> ElementTree.Element:
    root = _parse(file)
    if root.tag != "annotation":
        hint = "; this is CVAT's own format: export Pascal VOC or COCO" if root.tag == "annotations" else ""
        raise DataError(f"{file}: not a VOC annotation: its root is <{root.tag}>, not <annotation>{hint}")
    return root


def collect(
    pages: Sequence[Page],
    images: Sequence[str],
    all_pages: Sequence[Page],
    origin: str,
    *,
    official: bool = False,
    notes: Sequence[str] = (),
) -> Annotations:
    """Annotation files joined.

    `difficult` objects become crowds: left out of training (as by mmdetection, which the paper used) and ignored by
    COCO's evaluation; `voc_ap50` ignores them as VOC does. The classes are the names in all annotation files; those
    that differ by case alone are one class, unless they are single letters.

    Args:
        images: the image of each page.
        all_pages: those whose objects decide the classes: with other splits, so that all splits agree.
        official: whether the classes are VOC's 20 where these cover the objects.
    """
    class_of, said = _classes(Counter(thing.name for page in all_pages for thing in page.objects))
    ids = {name: i for i, name in enumerate(dict.fromkeys(class_of.values()), start=1)}
    if official and set(ids) <= set(CLASSES):
        ids = {name: i for i, name in enumerate(CLASSES, start=1)}
    objects = [
        (i, ids[class_of[thing.name]], thing.box, thing.difficult)
        for i, page in enumerate(pages)
        for thing in page.objects
    ]
    sized = [(image, page.size) for image, page in zip(images, pages, strict=True)]
    return from_objects(origin, {i: name for name, i in ids.items()}, sized, objects, [*notes, *said])


def image_of(page: Page, index: FileIndex, near: Sequence[str], faults: Faults) -> str | None:
    """The image of an annotation file: what its <filename> names, else the one that is called like the file itself.

    Args:
        index: where images are looked for.
        near: folders in which the annotation file lies: of several images the one in such folders is taken.
        faults: is told where several images answer.

    Returns:
        Path relative to the index's folder; where there is no such image, the one that is missing; None where it is not
        clear which.
    """
    stem = page.file.stem
    named = (parts_of(page.filename or "") or [""])[-1]
    stem_named = os.path.splitext(named)[0] or stem
    by_name, by_stem = index.by_name.get(named, []), index.by_stem.get(stem, [])
    if by_name and by_stem and stem_named != stem:
        text = f"{page.file}: is it of {by_name[0]}, its <filename>, or of {by_stem[0]}, which is called like it?"
        faults.tell(Fault("ambiguous", f"{text} Rename one, or correct <filename>"))
        return None
    found = _nearest(by_name or by_stem or index.by_stem.get(stem_named, []), "/".join(near))
    if len(found) > 1:
        why = "its <filename> names both" if by_name else f"its <filename> is {page.filename!r}, which is not there"
        text = f"{page.file}: its image can be {' or '.join(found[:3])}: {why}; correct <filename>"
        faults.tell(Fault("ambiguous", text))
        return None
    return found[0] if found else "/".join([*near, named if named and stem_named == stem else f"{stem}.jpg"])


def _nearest(paths: Sequence[str], folder: str) -> list[str]:
    """Those of some paths that lie in a folder; where none does, in one that ends most alike."""
    parents = {path: path.rpartition("/")[0] for path in paths}
    ends = [folder] if folder in parents.values() else nearest(list(parents.values()), folder.split("/"))
    return [path for path, parent in parents.items() if parent in ends]


def _parse(file: Path) -> ElementTree.Element:
    content = read_bytes(file)
    declared = DECLARED.match(content[:200].decode("latin-1"))
    text = decoded(content, file, declared.group(1) if declared else "utf-8")
    try:
        # Without its declaration: expat knows few encodings, and this is text already.
        return ElementTree.fromstring(DECLARED.sub("", text, count=1) if declared else text)
    except ElementTree.ParseError as error:
        raise DataError(f"{file}:{error.position[0]}: not valid XML: {error}") from None
    except ValueError as error:
        raise DataError(f"{file}: not XML that can be read: {error}") from None


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Height and width where the file gives them; some tools write 0, which counts as missing."""
    sides = [(root.findtext(f"size/{key}") or "").strip() for key in ("height", "width")]
    if not all(re.fullmatch(r"[0-9]{1,9}(\.0*)?", side) for side in sides):
        return None
    height, width = (int(float(side)) for side in sides)
    return (height, width) if height and width else None


def _object(element: ElementTree.Element) -> Object:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise EntryError("an object has no name")
    corners = [_number(element.findtext(f"bndbox/{key}")) for key in CORNERS]
    if None in corners:
        found = ", ".join(str(element.findtext(f"bndbox/{key}")) for key in CORNERS)
        raise EntryError(f"object {name}: bndbox must hold the numbers {', '.join(CORNERS)}; found {found}", "numbers")
    difficult = DIFFICULT.get((element.findtext("difficult") or "").strip().lower())
    if difficult is None:
        raise EntryError(f"object {name}: difficult must be 0 or 1, found {element.findtext('difficult')!r}")
    x1, y1, x2, y2 = corners
    return Object(name, [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], difficult)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _classes(counts: Counter[str]) -> tuple[dict[str, str], list[str]]:
    """Name in the files -> class, in the order of the classes; and a note where names became one."""
    spellings: dict[str, list[str]] = {}
    for name in counts:
        spellings.setdefault(name.casefold() if len(name) > 1 else name, []).append(name)
    class_of: dict[str, str] = {}
    for names in spellings.values():
        usual = max(sorted(names), key=lambda name: (name in CLASSES, counts[name]))
        class_of |= dict.fromkeys(names, usual)
    changed = [f"{name} as {best}" for name, best in sorted(class_of.items()) if name != best]
    notes = [f"class names that differ by case alone are read as one: {listed(changed, 8)}"] if changed else []
    return dict(sorted(class_of.items(), key=lambda item: (item[1], item[0]))), notes
