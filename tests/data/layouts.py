"""Small data sets in every layout, for tests to read and to spoil. Images are 20x10 (width x height) unless said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def content() -> dict[str, Any]:
    """Two images of 20x10 and 10x20 (width x height), ids with gaps, names not in the order of ids."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 20, "height": 10},
            {"id": 3, "file_name": "sub/b.png", "width": 10, "height": 20},
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 0, "name": "yak"}, {"id": 13, "name": "ant"}],
        "annotations": [
            {"id": 0, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 5.5, "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 0, "bbox": [0.5, 1.5, 10, 5]},
            {"id": 5, "image_id": 3, "category_id": 13, "bbox": [0, 0, 10, 20], "iscrowd": 1},
            {"id": 9, "image_id": 3, "category_id": 0, "bbox": [5, 5, 2, 2], "area": 4, "iscrowd": 0},
        ],
    }


def write_images(folder: Path, *names: str) -> None:
    """Images of 20x10 in a folder or, where names have them, in folders of it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(folder / name)


def write_text(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode(encoding))
    return file


def coco_of(*names: str, **changes: Any) -> dict[str, Any]:
    """COCO content for images of these names: one dog [2, 1, 6, 4] on each."""
    images = [{"id": i, "file_name": name, "width": 20, "height": 10} for i, name in enumerate(names, start=1)]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [2, 1, 6, 4], "area": 24, "iscrowd": 0}
        for i in range(1, len(names) + 1)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}], **changes}


def write_coco(file: Path, *names: str, **changes: Any) -> None:
    write_text(file, json.dumps(coco_of(*names, **changes)))


def thing(name: str, box: tuple[float, ...], difficult: object = None) -> str:
    """A VOC object; its part is no object of its own."""
    corners = "".join(f"<{key}>{v}</{key}>" for key, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    mark = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{mark}<bndbox>{corners}</bndbox>{part}</object>"


def page(filename: str, *objects: str, size: str = "<width>20</width><height>10</height>") -> str:
    """A VOC annotation file."""
    named = f"<filename>{filename}</filename>" if filename else ""
    return f"<annotation>{named}<size>{size}</size>\n{''.join(objects)}</annotation>"


DOG = thing("dog", (3, 2, 8, 5))
"""The same box as COCO's [2, 1, 6, 4]: VOC counts from 1 and includes the last pixel."""


def write_voc(folder: Path, **sets: list[str]) -> None:
    """VOC's layout: name of an image set -> names of images, one dog on each."""
    for name, stems in sets.items():
        write_text(folder / "ImageSets/Main" / f"{name}.txt", "".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            write_images(folder / "JPEGImages", f"{stem}.jpg")
            write_text(folder / "Annotations" / f"{stem}.xml", page(f"{Path(stem).name}.jpg", DOG))


def write_yolo(folder: Path, **splits: list[str]) -> None:
    """YOLO's layout: name of a split -> names of images, one dog on each and a cat on the first of each split."""
    for split, stems in splits.items():
        for i, stem in enumerate(stems):
            write_images(folder / "images" / split, f"{stem}.jpg")
            # Centre 5, 3 and sides 6, 4 of 20x10: [2, 1, 6, 4].
            write_text(folder / "labels" / split / f"{stem}.txt", "1 0.25 0.3 0.3 0.4\n" + "0 0.5 0.5 1 1\n" * (i == 0))
    entries = "".join(f"{split}: images/{split}\n" for split in splits)
    write_text(folder / "data.yaml", f"{entries}nc: 2\nnames: [cat, dog]\n")
