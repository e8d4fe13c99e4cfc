"""YOLO's text files: one for each image, a line `class x y w h` for each object, in shares of the image's sides."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from defeat_cli.data.annotations import Annotations, from_objects, kind_of
from defeat_cli.data.faults import EntryError, Fault, Faults, ImageError
from defeat_cli.data.formats.splits import DIVIDE, NAMES, NoSplitError, named_file, part_of, splits_of
from defeat_cli.data.images import FileIndex, leaves, parts_of
from defeat_cli.data.reading import read_lines, read_yaml
from defeat_cli.data.transforms import image_size
from defeat_cli.errors import DataError
from defeat_cli.text import counted, listed, out_of

CONFIGS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_LISTS = ("classes.txt", "obj.names", "data/obj.names", "labels/classes.txt", "predefined_classes.txt")
BEYOND = 1.01
"""Shares may exceed 1 by a rounding; more is another unit."""


class Config(NamedTuple):
    """What `data.yaml` says, or the list of names that stands for it.

    file: where it was read; names: class id -> name; entries: split -> folders or lists of images.
    keypoints: whether keypoints follow each box.
    """

    file: Path
    names: dict[int, str]
    entries: dict[str, list[str]]
    keypoints: bool = False


def matches(path: Path) -> bool:
    """Whether a folder has a `data.yaml`, or a list of names beside text files of YOLO's kind."""
    return _config_file(path) is not None


def read(
    path: Path, split: str, annotations: str | None = None, images: str | None = None, faults: Faults | None = None
) -> tuple[Annotations, Path]:
    """See `formats.FORMATS`.

    Args:
        annotations: the `data.yaml` or list of names, relative to `path`.
        images: folder or list of images relative to `path`, in place of what `data.yaml` says.
    """
    file = named_file(path, annotations) if annotations is not None else _config_file(path)
    if file is None:
        raise DataError(f"{path}: no data.yaml, nor a list of class names ({', '.join(NAME_LISTS)})")
    faults = faults or Faults()
    config = _read_config(file)
    notes: list[str] = []
    files = _images(path, config, split, images, faults)
    if len(set(files)) < len(files):
        repeated = len(files) - len(set(files))
        notes.append(f"{counted(repeated, 'image is', 'images are')} listed twice, and read once")
        files = list(dict.fromkeys(files))
    folder = _common_folder(path, files)
    sized, objects, unlabelled = [], [], []
    for image in files:
        try:
            size = image_size(Path(image))
        except ImageError as error:
            faults.tell(Fault(error.rule, str(error), Path(image)))
            continue
        label = _label_file(image)
        if label is None:
            unlabelled.append(image)
        else:
            objects += [(len(sized), kind, box, False) for kind, box in _read_labels(label, size, config, faults)]
        sized.append((os.path.relpath(image, folder).replace(os.sep, "/"), size))
    if len(unlabelled) == len(files):
        raise DataError(
            f"{config.file}: none of the {counted(len(files), f'{split} image')} has a label file; for {files[0]} "
            f"looked for {' and '.join(map(str, _label_places(files[0])))}"
        )
    if unlabelled:
        without = out_of(len(unlabelled), len(files), "image", "has no label file", "have no label file")
        notes.append(f"{without} ({listed(unlabelled, 3)}); such are taken for images without objects")
    if alone := _labels_alone(files):
        notes.append(f"label files without an image, which are not used: {listed(alone, 3)}")
        faults.tell([Fault("label alone", f"{label}: there is no image of this name") for label in alone])
    return from_objects(f"{config.file} ({split})", config.names, sized, objects, notes), folder


def _common_folder(path: Path, files: Sequence[str]) -> Path:
    """The data set's folder, or the one around it in which the images are too: data.yaml may name others."""
    parents = {os.path.dirname(os.path.abspath(file)) for file in files}
    base = os.path.abspath(path)
    common = os.path.commonpath([base, *parents])
    return path if common == base else Path(common)


def _config_file(path: Path) -> Path | None:
    for name in CONFIGS:
        if (path / name).is_file():
            return path / name
    yamls = (
        [file for file in sorted(path.glob("*.y*ml")) if file.is_file() and _is_config(file)] if path.is_dir() else []
    )
    if len(yamls) == 1:
        return yamls[0]
    return next((path / name for name in NAME_LISTS if (path / name).is_file()), None)


def _is_config(file: Path) -> bool:
    try:
        content = read_yaml(file)
    except DataError:
        return False
    return isinstance(content, dict) and "names" in content and bool(content.keys() & {"train", "val", "nc", "path"})


def _read_config(file: Path) -> Config:
    """Check a `data.yaml`, or a list of names.

    Raises:
        DataError: names the key at fault.
    """
    if file.suffix.lower() not in (".yaml", ".yml"):
        lines = [line.strip() for line in read_lines(file)]
        while lines and not lines[-1]:
            lines.pop()
        return Config(file, _names(lines, file, None), {})
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise DataError(f"{file}: must be a mapping with names, train and val; found {kind_of(content)}")
    if "names" not in content:
        raise DataError(f"{file}: names is missing: a list of class names, or a mapping of ids to names")
    names = _names(content["names"], file, content.get("nc"))
    base = content.get("path") or ""
    if not isinstance(base, str):
        raise DataError(f"{file}: path must be a folder, found {kind_of(base)}")
    entries = {}
    for split, spellings in NAMES.items():
        key = next((key for key in spellings if content.get(key)), None)
        if key is not None:
            value = content[key] if isinstance(content[key], list) else [content[key]]
            if not all(isinstance(entry, str) for entry in value):
                raise DataError(f"{file}: {key} must be a folder or a list of them, found {content[key]!r}")
            entries[split] = [_existing(file.parent, base, entry, f"{file}: {key}") for entry in value]
    return Config(file, names, entries, bool(content.get("kpt_shape")))


def _names(value: Any, file: Path, count: Any) -> dict[int, str]:
    rows = (
        list(enumerate(value)) if isinstance(value, list) else list(value.items()) if isinstance(value, dict) else None
    )
    if not rows:
        raise DataError(f"{file}: names must be a list of class names, or a mapping of ids to names; found {value!r}")
    names: dict[int, str] = {}
    for key, name in rows:
        number = int(key) if isinstance(key, int) or (isinstance(key, str) and re.fullmatch(r"[0-9]{1,6}", key)) else -1
        if number < 0 or number in names:
            raise DataError(f"{file}: names: {key!r} is no class id, or is there twice; ids are 0, 1, …")
        if isinstance(name, bool) or not isinstance(name, str | int | float) or not str(name).strip():
            raise DataError(f"{file}: names: class {key} must have a name, found {name!r}")
        names[number] = str(name).strip()
    twice = next((name for name in names.values() if list(names.values()).count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}: names: {twice!r} is there more than once")
    if count is not None and count != len(names) and str(count) != str(len(names)):
        raise DataError(f"{file}: nc is {count!r}, but names has {counted(len(names), 'class')}")
    return names


def _existing(folder: Path, base: str, entry: str, what: str) -> str:
    """A folder or list that `data.yaml` names, where it lies here: the file is often written on another machine."""
    parts = [*parts_of(base), *parts_of(entry)]
    places = [Path(base) / entry, folder / base / entry, folder / entry]
    places += [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    for place in places:
        if os.path.exists(place):
            return os.path.normpath(place)
    raise DataError(f"{what}: {entry!r} is not there; looked for {listed([str(place) for place in places[1:]], 4)}")


def _images(path: Path, config: Config, split: str, named: str | None, faults: Faults) -> list[str]:
    """The image files of a split.

    Raises:
        DataError: there are none.
    """
    wanted = part_of(split)
    if named is not None:
        sources = [str(path / named)]
    elif wanted in config.entries:
        sources = config.entries[wanted]
    else:
        index = FileIndex(path)
        splits = {image: splits_of(Path(image).parent) for image in index.paths}
        chosen = [image for image in index.paths if splits[image] == {wanted}]
        if not chosen and not any(splits.values()) and not config.entries:
            if split != "all":
                raise NoSplitError(f"{path}: its images are not divided into train and val; {DIVIDE}")
            chosen = index.paths
        if not chosen:
            where = f"{config.file} has no key {wanted}, and " if config.entries else ""
            raise NoSplitError(
                f"{path}: no {wanted} images: {where}there are none in a folder called {' or '.join(NAMES[wanted])}; "
                f"name one by data.{wanted}_images, or {DIVIDE}"
            )
        return [str(path / image) for image in chosen]
    files = [file for source in sources for file in _expand(source, path, faults)]
    if not files:
        raise DataError(f"{config.file}: no images in {listed(sources, 3)} ({wanted})")
    return files


def _expand(source: str, path: Path, faults: Faults) -> list[str]:
    """The images of a folder, or of a text file that lists them, all within the data set's folder or the file's."""
    if os.path.isdir(source):
        return [os.path.join(source, image) for image in FileIndex(Path(source)).paths]
    if not source.endswith(".txt"):
        raise DataError(f"{source}: neither a folder of images nor a .txt list of them")
    files = []
    for number, line in enumerate(read_lines(Path(source)), start=1):
        if line.strip():
            parts = parts_of(line.strip())
            places = [
                line.strip(),
                *(os.path.join(os.path.dirname(source), *parts[start:]) for start in range(len(parts))),
            ]
            file = next((place for place in places if os.path.isfile(place)), None)
            if file is None:
                faults.tell(Fault("missing", f"{source}:{number}: {line.strip()!r} is not there"))
            elif all(leaves(os.path.abspath(file), folder) for folder in (path, Path(source).parent)):
                text = f"{source}:{number}: {line.strip()!r} lies outside of {path}; only its own images are read"
                faults.tell(Fault("climbs", text))
            else:
                files.append(os.path.normpath(file))
    return files


def _label_places(image: str) -> list[str]:
    """Where an image's label file can be: in `labels` in place of the last `images`, or beside the image."""
    stem = os.path.splitext(image)[0]
    head, found, tail = f"/{stem.replace(os.sep, '/')}".rpartition("/images/")
    swapped = [f"{head}/labels/{tail}.txt"[1:]] if found else []
    return [*swapped, f"{stem}.txt"]


def _label_file(image: str) -> str | None:
    return next((place for place in _label_places(image) if os.path.isfile(place)), None)


def _labels_alone(images: Sequence[str]) -> list[str]:
    """Label files in the images' own `labels` folders that no image beside those images goes with."""
    stems: dict[str, set[str]] = {}
    for folder in {os.path.dirname(image) for image in images}:
        swapped, *beside = _label_places(os.path.join(folder, "any.any"))
        if beside:  # text files beside images may be anything
            there = {os.path.splitext(name)[0] for name in os.listdir(folder)}
            stems.setdefault(os.path.dirname(swapped), set()).update(there)
    return sorted(
        os.path.join(folder, name)
        for folder, there in stems.items()
        if os.path.isdir(folder)
        for name in os.listdir(folder)
        if name.endswith(".txt") and name not in NAME_LISTS and os.path.splitext(name)[0] not in there
    )


def _read_labels(file: str, size: tuple[int, int], config: Config, faults: Faults) -> list[tuple[int, list[float]]]:
    """Class id and box [x, y, width, height] in pixels of each line.

    Args:
        faults: is told of a file, or a line of it, at fault.
    """
    objects = []
    try:
        lines = read_lines(Path(file))
    except DataError as error:
        faults.tell(Fault("entry", str(error)))
        return []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            objects.append(_object(line.split(), size, config))
        except EntryError as fault:
            faults.tell(Fault(fault.rule, f"{file}:{number}: {fault}"))
    return objects


def _object(words: Sequence[str], size: tuple[int, int], config: Config) -> tuple[int, list[float]]:
    """One line; a `EntryError` says what is wrong with it."""
    shown = " ".join(words[:7]) + (" …" if len(words) > 7 else "")
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise EntryError(f"must be numbers, class x y w h; found {shown!r}", "numbers") from None
    if len(values) == 6 and not config.keypoints:
        raise EntryError(f"has 6 numbers: with a score behind each box these are detections, not labels ({shown})")
    polygon = len(values) >= 7 and len(values) % 2 == 1 and not config.keypoints
    if len(values) != 5 and not polygon and not (config.keypoints and len(values) > 5):
        raise EntryError(f"must be class x y w h, or class and the points x y of a polygon; found {shown!r}")
    if not values[0].is_integer() or int(values[0]) not in config.names:
        known = f"{config.file.name} has {counted(len(config.names), 'class')}, counted from 0"
        text = f"class {words[0]} is not known; {known}"
        raise EntryError(text, "unknown category")
    shares = values[1:] if polygon else values[1:5]
    if not all(math.isfinite(share) and 1 - BEYOND <= share <= BEYOND for share in shares):
        rule = "units" if all(map(math.isfinite, shares)) else "numbers"
        raise EntryError(f"x y w h must be shares of the image within 0..1, found {shown!r}", rule)
    height, width = size
    if polygon:
        xs, ys = shares[0::2], shares[1::2]
        left, top, w, h = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    else:
        x, y, w, h = shares
        left, top = x - w / 2, y - h / 2
    return int(values[0]), [left * width, top * height, w * width, h * height]
