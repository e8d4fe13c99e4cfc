"""Layouts of data sets, one a file: what a folder has to be like, and how it is read."""

from __future__ import annotations

from types import ModuleType

from defeat_cli.data.formats import coco, voc, xml, yolo

FORMATS: dict[str, ModuleType] = {"voc": voc, "coco": coco, "yolo": yolo, "xml": xml}
"""Value of `data.format` -> module. Where a folder is like several, the first is taken.

Each has

    matches(path) -> bool
        Whether a folder is in this layout; costs no more than a look at some files.
    read(path, split, annotations=None, images=None, faults=None) -> tuple[Annotations, Path]
        A split (`train`, `val`, `test`; `all` for what can be divided into train and val) and the folder that its file
        names are relative to. `annotations` and `images` are what the user names in place of what the layout says.
        `faults` is told of entries at fault; what it tolerates is left out.
        Raises NoSplitError: no such split (says what is there and what to do). DataError: annotations that cannot be
        used.
"""
