"""What the parts of a data set are called, in folders and files of every layout."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from defeat_cli.errors import DataError

NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Split -> what it may be called."""
FOLDERS = ("images", "imgs", "img", "JPEGImages", "data")
"""What folders of images are called."""
DIVIDE = "set a part of the images apart by --set data.val_fraction=0.2"
"""What to do where nothing says which images validate."""


class NoSplitError(DataError):
    """The data has no such split."""


def part_of(split: str) -> str:
    """The split whose data and settings serve for a split: of `all`, what is to be divided, it is `train`."""
    return "train" if split == "all" else split


def splits_of(path: PurePath) -> set[str]:
    """The splits that the words in a path name, e.g. `train` for `annotations/instances_train2017`."""
    words = set(re.findall(r"[a-z]+", str(path).lower()))
    return {split for split, names in NAMES.items() if words.intersection(names)}


def named_file(path: Path, name: str) -> Path:
    """The file that a setting names, relative to the data folder.

    Raises:
        DataError: no such file; names those that are there.
    """
    file = path / name
    if os.path.isfile(file):
        return file
    there = sorted(other.name for other in file.parent.iterdir()) if os.path.isdir(file.parent) else []
    listed = f"; {file.parent} holds {', '.join(there[:8])}{', …' if len(there) > 8 else ''}" if there else ""
    raise DataError(f"{file}: no such file{listed}")
