"""COCO's JSON files, in the layouts that COCO itself, Roboflow, CVAT, Label Studio and people give them."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path

from defeat_cli.data.annotations import KEYS, Annotations, read_annotations
from defeat_cli.data.faults import Faults
from defeat_cli.data.formats.splits import DIVIDE, FOLDERS, NAMES, NoSplitError, named_file, part_of, splits_of
from defeat_cli.data.images import place_images
from defeat_cli.errors import DataError
from defeat_cli.text import listed

LAYOUTS = ("annotations/instances_{}2017.json", "{}.json", "{}/_annotations.coco.json")
"""COCO's own annotation file of a split, that of the simple layout, and Roboflow's."""


def matches(path: Path) -> bool:
    """Whether a folder, or a file, holds COCO annotations."""
    return bool(_files(path))


def read(
    path: Path, split: str, annotations: str | None = None, images: str | None = None, faults: Faults | None = None
) -> tuple[Annotations, Path]:
    """See `formats.FORMATS`.

    Args:
        annotations: file relative to `path`.
        images: folder relative to `path`.
    """
    folder = path if path.is_dir() else path.parent
    file = named_file(folder, annotations) if annotations is not None else _file_of(folder, _files(path), split)
    if images is not None and not os.path.isdir(folder / images):
        raise DataError(f"{folder / images}: no such folder (data.{part_of(split)}_images)")
    faults = faults or Faults()
    content = read_annotations(file, faults)
    beneath = folder / (images or ".")
    folders = _folders(folder, file, split) if images is None else [beneath]
    names, place, notes = place_images(content.file_names, folders, beneath, content.origin, faults)
    return content.placed(names, notes), place


def _file_of(path: Path, files: Sequence[Path], split: str) -> Path:
    """The annotation file of a split; of `all`, the training one or the only one."""
    wanted = part_of(split)
    for layout in LAYOUTS:
        for name in NAMES[wanted]:
            if path / layout.format(name) in files:
                return path / layout.format(name)
    mine = [file for file in files if splits_of(file.relative_to(path).with_suffix("")) == {wanted}]
    if not mine and split == "all":
        mine = list(files)
    if len(mine) > 1:  # COCO's own are beside the instances
        mine = [file for file in mine if not file.name.startswith("person_keypoints")]
    if len(mine) == 1:
        return mine[0]
    setting = f"data.{wanted}_annotations"
    shown = listed([str(file.relative_to(path)) for file in mine or files], 6)
    if mine:
        raise DataError(f"{path}: several annotation files can be the {wanted} data: {shown}; name one by {setting}")
    whole = "" if any(splits_of(file.relative_to(path)) for file in files) else f", or {DIVIDE}"
    sought = ", ".join(layout.format(wanted) for layout in LAYOUTS)
    raise NoSplitError(
        f"{path}: read as COCO, but no {wanted} data there. Looked for {sought}; "
        f"found {shown or 'no COCO file'}. Name it by --set {setting}=FILE{whole}"
    )


def _files(path: Path) -> list[Path]:
    """The COCO files of a folder: by their names where a layout says so, else by their content."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" else []
    named = {path / layout.format(name) for layout in LAYOUTS for names in NAMES.values() for name in names}
    places = (
        path,
        path / "annotations",
        path / "Annotations",
        *(path / name for names in NAMES.values() for name in names),
        *(folder for folder in path.iterdir() if _holds_json_alone(folder)),
    )
    there = {file for place in places if place.is_dir() for file in place.glob("*.json")}
    return sorted(file for file in there if file.is_file() and (file in named or _is_coco(file)))


def _holds_json_alone(path: Path) -> bool:
    """Whether a folder holds JSON files and nothing else, so that the images are beside it."""
    return path.is_dir() and all(inner.suffix.lower() == ".json" for inner in path.iterdir())


def _is_coco(file: Path) -> bool:
    """Whether a JSON file has the keys of COCO's, wherever in it they are."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(f'"{key}"'.encode()) >= 0 for key in KEYS)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False


def _folders(path: Path, file: Path, split: str) -> list[Path]:
    """Where the images of an annotation file may be, likeliest first."""
    wanted = part_of(split)
    own = re.sub(r"^(instances|annotations|labels)?[_.-]*", "", file.stem)  # train2017 of instances_train2017
    names = [name for name in dict.fromkeys((own, *NAMES[wanted])) if name]
    places = [path / name for name in names]
    places += [path / parent / name for parent in FOLDERS for name in names]
    places += [path / name / parent for name in names for parent in FOLDERS]
    places += [parent / name for parent in dict.fromkeys((file.parent, path)) for name in (*FOLDERS, ".")]
    return [place for place in places if place.is_dir()] or [path]
