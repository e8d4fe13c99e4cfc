"""A folder of images with VOC's XML files beside them or in a folder of their own, and no lists of images."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from defeat_cli.data.annotations import Annotations
from defeat_cli.data.faults import Faults
from defeat_cli.data.formats import voc
from defeat_cli.data.formats.splits import DIVIDE, NAMES, NoSplitError, part_of, splits_of
from defeat_cli.data.formats.voc_xml import collect, image_of, read_page
from defeat_cli.data.images import FileIndex
from defeat_cli.errors import DataError


def matches(path: Path) -> bool:
    """Whether an XML file of VOC's kind lies in a folder, or in folders of it, and no image sets."""
    if voc.matches(path) or any(voc.matches(inner) for inner in path.iterdir() if inner.is_dir()):
        return False
    for xml in FileIndex(path, _is_xml).paths[:5]:
        with (path / xml).open("rb") as file:
            if b"<annotation" in file.read(2000).replace(b"\0", b""):
                return True
    return False


def read(
    path: Path, split: str, annotations: str | None = None, images: str | None = None, faults: Faults | None = None
) -> tuple[Annotations, Path]:
    """See `formats.FORMATS`. Folders called like splits make the splits; without them there is one undivided whole.

    Args:
        annotations, images: folders relative to `path`.
    """
    wanted = part_of(split)
    for setting, name in (("annotations", annotations), ("images", images)):
        if name is not None and not (path / name).is_dir():
            raise DataError(f"{path / name}: no such folder (data.{wanted}_{setting})")
    xmls = FileIndex(path / (annotations or "."), _is_xml)
    if not xmls.paths:
        raise DataError(f"{xmls.folder}: no XML files there")
    split_of = {xml: splits_of(PurePosixPath(xml).parent) for xml in xmls.paths}
    chosen = xmls.paths
    if any(split_of.values()):
        chosen = [xml for xml in xmls.paths if split_of[xml] == {wanted}]
    elif split != "all" and annotations is None:
        raise NoSplitError(f"{path}: its {len(chosen)} XML files are not divided into train and val; {DIVIDE}")
    if not chosen:
        there = sorted({name for splits in split_of.values() for name in splits})
        raise NoSplitError(
            f"{path}: no XML files in a folder called {' or '.join(NAMES[wanted])}; there is {', '.join(there)}. "
            f"Name a folder by data.{wanted}_annotations"
        )
    faults = faults or Faults()
    pages = {xml: page for xml in xmls.paths if (page := read_page(xmls.folder / xml, faults)) is not None}
    index = FileIndex(path / (images or "."))
    files = {
        xml: image_of(pages[xml], index, _folders(xmls.folder / xml, index.folder), faults)
        for xml in chosen
        if xml in pages
    }
    files = {xml: image for xml, image in files.items() if image is not None}
    found = [pages[xml] for xml in files]
    return collect(found, list(files.values()), list(pages.values()), str(xmls.folder)), index.folder


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml")


def _folders(xml: Path, folder: Path) -> list[str]:
    """Folders that an annotation file lies in, below one."""
    parent = xml.parent
    return list(parent.relative_to(folder).parts) if parent.is_relative_to(folder) else []
