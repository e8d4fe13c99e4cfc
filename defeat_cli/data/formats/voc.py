"""PASCAL VOC's own layout: `JPEGImages`, `Annotations`, and lists of images in `ImageSets/Main`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from defeat_cli.data.annotations import Annotations
from defeat_cli.data.faults import Fault, Faults
from defeat_cli.data.formats.splits import DIVIDE, NoSplitError, part_of
from defeat_cli.data.formats.voc_xml import Page, collect, image_of, read_page
from defeat_cli.data.images import FileIndex, is_image
from defeat_cli.data.reading import read_lines
from defeat_cli.errors import DataError
from defeat_cli.text import counted, listed

IMAGE_SETS = "ImageSets/Main"


class ImageSet(NamedTuple):
    """One list of images: `folder/ImageSets/Main/name.txt`, with `folder/JPEGImages` and `folder/Annotations`."""

    folder: Path
    name: str

    @property
    def file(self) -> Path:
        return self.folder / IMAGE_SETS / f"{self.name}.txt"


def matches(path: Path) -> bool:
    """Whether a folder is in VOC's layout, or one in it is, like `VOC2007` in `VOCdevkit`."""
    return _has_layout(path) or bool(_years(path))


def read(
    path: Path, split: str, annotations: str | None = None, images: str | None = None, faults: Faults | None = None
) -> tuple[Annotations, Path]:
    """See `formats.FORMATS`.

    Args:
        annotations: image sets, see `find_image_sets`.
        images: not for this layout, whose images are in `JPEGImages`.
    """
    if images is not None:
        raise DataError(
            f"{path}: is in VOC's layout, whose images are in JPEGImages; leave data.{part_of(split)}_images out"
        )
    found, files, notes, pages = [], [], [], []
    faults = faults or Faults()
    image_sets = find_image_sets(path, split, annotations)
    for folder in dict.fromkeys(image_set.folder for image_set in image_sets):
        index, xmls = FileIndex(folder / "JPEGImages"), _Annotations(folder, faults)
        pictures = (folder / "JPEGImages").relative_to(path).as_posix()
        names = [name for image_set in image_sets if image_set.folder == folder for name in xmls.listed(image_set)]
        for name in dict.fromkeys(names):
            page = xmls.page(name)
            image = page and image_of(page, index, name.split("/")[:-1], faults)
            if image:
                found.append(page)
                files.append(f"{pictures}/{image}".removeprefix("./"))
        if len(set(names)) < len(names):
            repeated = len(names) - len(set(names))
            lines = counted(repeated, "line of the image sets repeats", "lines of the image sets repeat")
            notes.append(f"{lines} an image, which is read once")
        pages += xmls.all_pages()
    origin = " + ".join(str(image_set.file) for image_set in image_sets)
    return collect(found, files, pages, origin, official=True, notes=notes), path


def find_image_sets(path: Path, split: str, named: str | None = None) -> list[ImageSet]:
    """The image sets that make up a split.

    Args:
        path: a folder in VOC's layout, or one that holds such folders, like `VOCdevkit`.
        split: the set of that name, where `named` is None; for `all` `trainval` or else `train`.
        named: one set or several, e.g. `trainval`, or `VOC2007/trainval+VOC2012/trainval`.

    Raises:
        DataError: no VOC layout, or no such image set; lists those that are there.
    """
    years = _years(path)
    image_sets = []
    for part in (named or split).split("+"):
        folder, _, name = part.strip().removesuffix(".txt").rpartition("/")
        inner = years[0] if not folder and len(years) == 1 and not _has_layout(path) else folder
        if named is None and split == "all":
            name = "trainval" if (path / inner / IMAGE_SETS / "trainval.txt").is_file() else "train"
        image_sets.append(ImageSet(path / inner, name))
    for image_set in image_sets:
        folder, name = image_set
        if not _has_layout(folder):
            hint = f"; name image sets in its folders, e.g. {years[0]}/{name}" if years else ""
            raise DataError(f"{folder}: not in VOC's layout (JPEGImages, Annotations, {IMAGE_SETS}){hint}")
        if not image_set.file.is_file():
            there = sorted(file.stem for file in (folder / IMAGE_SETS).glob("*.txt"))
            raise NoSplitError(
                f"{folder / IMAGE_SETS}: no image set {name}; there are: {listed(there, 10) or 'none'}. "
                f"Name one by data.train_annotations, data.val_annotations, or {DIVIDE}"
            )
    return image_sets


class _Annotations:
    """The annotation files of a folder in VOC's layout, each read once."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self.folder = folder / "Annotations"
        self.faults = faults
        index = FileIndex(self.folder, lambda name: name.lower().endswith(".xml"))
        self.path_of = {path[:-4]: path for path in index.paths}
        self.by_stem = index.by_stem
        self.pages: dict[str, Page | None] = {}

    def listed(self, image_set: ImageSet) -> list[str]:
        """The images of a set, as the names of annotation files without `.xml`.

        A line is a whole name, whatever characters it holds. In a class's own set a second column says where the class
        is, which is not needed.

        Raises:
            DataError: a line for which there is no annotation file, or several.
        """
        names = []
        for number, line in enumerate(read_lines(image_set.file), start=1):
            if not line.strip():
                continue
            stripped = line.strip()
            column = re.fullmatch(r"(.*\S)\s+-?[01]", stripped)
            forms = (line, stripped, column and column[1], is_image(stripped) and os.path.splitext(stripped)[0])
            name = next((form for form in forms if form and form in self.path_of), None)
            if name is None:
                deeper = sorted({path for form in forms if form for path in self.by_stem.get(form, [])})
                where = f"{image_set.file}:{number}"
                if len(deeper) > 1:
                    text = f"{where}: {stripped} can be {' or '.join(deeper[:3])}; give its folder"
                    self.faults.tell(Fault("ambiguous", text))
                if not deeper:
                    missing = self.folder / f"{column[1] if column else stripped}.xml"
                    text = f"{missing}: is listed in an image set ({where}), but is not there"
                    self.faults.tell(Fault("entry", text))
                    continue
                name = deeper[0][:-4]
            names.append(name)
        return names

    def page(self, name: str) -> Page | None:
        """The annotation file of this name, without `.xml`; None where it cannot be read."""
        if name not in self.pages:
            self.pages[name] = read_page(self.folder / self.path_of[name], self.faults)
        return self.pages[name]

    def all_pages(self) -> list[Page]:
        """Every annotation file of the folder that can be read."""
        return [page for page in map(self.page, self.path_of) if page is not None]


def _has_layout(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in ("JPEGImages", "Annotations", IMAGE_SETS))


def _years(path: Path) -> list[str]:
    """Names of the folders in VOC's layout inside one, like VOC2007."""
    return sorted(child.name for child in path.iterdir() if _has_layout(child)) if path.is_dir() else []
