"""The image files of a folder, found by what annotations call them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from defeat_cli.data.faults import Fault, Faults
from defeat_cli.errors import DataError
from defeat_cli.text import counted, listed

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SAMPLE = 20
"""So many names, spread over all, decide in which folder the images are."""


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


class FileIndex:
    """All files beneath a folder that `wanted` takes, by name.

    paths: relative to the folder, with `/`, sorted.
    """

    def __init__(self, folder: Path, wanted: Callable[[str], bool] = is_image) -> None:
        self.folder = folder
        self.paths: list[str] = []
        seen = set()
        for parent, folders, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            if real not in seen:  # a link may lead back up
                base = Path(parent).relative_to(folder).as_posix()
                self.paths += [name if base == "." else f"{base}/{name}" for name in files if wanted(name)]
            seen.add(real)
        self.paths.sort()

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """File name -> paths that end in it."""
        return self._grouped(lambda name: name)

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """File name without its suffix -> paths."""
        return self._grouped(lambda name: os.path.splitext(name)[0])

    def _grouped(self, key: Callable[[str], str]) -> dict[str, list[str]]:
        groups = defaultdict(list)
        for path in self.paths:
            groups[key(path.rpartition("/")[2])].append(path)
        return groups


def parts_of(name: str) -> list[str]:
    """The parts of a file name as labelling tools write it: with folders of another machine, or as a URL."""
    if "?d=" in name:  # Label Studio: /data/local-files/?d=images/a.jpg
        name = unquote(name.partition("?d=")[2])
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        name = unquote(re.split(r"[?#]", name, maxsplit=1)[0].partition("://")[2])
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def without_upload_prefix(name: str) -> str:
    """A file's own name, where Label Studio put eight hexadecimal digits before it as it was uploaded."""
    return re.sub(r"^[0-9a-f]{8}-(?=.)", "", name)


def nearest(paths: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Those of some paths that share the most parts with `wanted`, counted from their ends."""

    def shared(path: str) -> int:
        parts = list(zip(reversed(path.split("/")), reversed(wanted), strict=False))
        return next((i for i, (one, other) in enumerate(parts) if one != other), len(parts))

    most = max(map(shared, paths), default=0)
    return [path for path in paths if shared(path) == most]


def leaves(name: str, folder: Path) -> bool:
    """Whether a file name leads out of the folder that it is relative to. Links are not looked at: they are there
    because somebody put them there."""
    if ".." not in name and not os.path.isabs(name):
        return False
    base = os.path.abspath(folder)
    place = os.path.normpath(os.path.join(base, name))
    return os.path.commonpath([base, place]) != base


def place_images(
    names: Sequence[str], folders: Sequence[Path], beneath: Path, origin: str, faults: Faults
) -> tuple[list[str], Path, list[str]]:
    """Where the images are that annotations name.

    Args:
        names: as the annotations have them.
        folders: tried first, in this order: the one in which most of the names are files.
        beneath: where no folder has any, this one is searched for files whose paths end as the names do.
        origin: the annotations, for messages.
        faults: is told of names that several files answer to.

    Returns:
        File names, the folder that they are relative to, and notes. A name that leads out of the folder stays as it is.

    Raises:
        DataError: no image is found, or several answer to one name.
    """
    sample = [names[i * len(names) // min(SAMPLE, len(names))] for i in range(min(SAMPLE, len(names)))]
    found = {folder: sum(_is_inside(folder, name, beneath) for name in sample) for folder in dict.fromkeys(folders)}
    best = max(found, key=found.__getitem__)
    if found[best]:
        if not any(leaves(name, best) for name in names):
            return list(names), best, []
        # `../images/a.jpg` of a file in annotations: from the whole data set's folder on it leads nowhere else.
        return [os.path.relpath(os.path.join(best, name), beneath) for name in names], beneath, []
    # An absolute name is one of another machine, as labelling tools write them: only its end is looked for.
    climbing = {name for name in names if not os.path.isabs(name) and leaves(name, best)}
    index = FileIndex(beneath)
    placed = []
    for name in names:
        parts = parts_of(name)
        there = index.by_name.get(parts[-1]) or index.by_name.get(without_upload_prefix(parts[-1]), []) if parts else []
        candidates = [] if name in climbing else nearest(there, parts)
        if len(candidates) > 1:
            text = f"{origin}: image {name!r} can be {' or '.join(candidates[:3])} in {beneath}"
            faults.tell(Fault("ambiguous", f"{text}; name the folder by data.train_images, data.val_images"))
        placed.append(candidates[0] if candidates else None)
    missing = [name for name, path in zip(names, placed, strict=True) if path is None]
    if len(missing) == len(names) and climbing:
        return list(names), best, []  # whoever opens the data refuses them
    if len(missing) == len(names):
        there = [str(folder) for folder in found if folder.is_dir()]
        raise DataError(
            f"{origin}: not one of its {counted(len(names), 'image')} is there ({listed(missing, 3)}). Looked in "
            f"{listed(there, 6) or beneath} and for files of these names anywhere in {beneath}; name the folder by "
            "data.train_images, data.val_images"
        )
    example = next((name, path) for name, path in zip(names, placed, strict=True) if path is not None)
    note = f"images were found by the ends of their names: {example[0]} is {PurePosixPath(example[1])}"
    return [name if path is None else path for name, path in zip(names, placed, strict=True)], beneath, [note]


def _is_inside(folder: Path, name: str, beneath: Path) -> bool:
    """Whether a name is that of a file in a folder, or elsewhere beneath the whole."""
    inside = not leaves(name, folder) or not leaves(os.path.abspath(folder / name), beneath)
    return inside and os.path.isfile(folder / name)
