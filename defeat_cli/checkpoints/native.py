"""Our own checkpoints: a detector that knows its architecture and classes, with what training needs to go on.

{"format": "defeat", "version": 2, "recipe": {…}, "classes": [names], "student": plain torchvision state dict,
 "metrics": {…}, "training": {…}, "folder": "../.."}

`training` is there where a run can go on from the file. `folder` leads from the checkpoint's own folder to the one that
paths in the recipe start from. In version 1 a detector of torchvision's builders was run with the builder's thresholds,
whatever its recipe says.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from defeat_cli.checkpoints.meaning import Meaning, meaning_of_recipe, with_meaning
from defeat_cli.checkpoints.reading import read
from defeat_cli.checkpoints.weights import StateDict, Weights, is_state_dict
from defeat_cli.config.architecture import TORCHVISION_BUILDERS, Architecture, own_settings
from defeat_cli.errors import CheckpointError
from defeat_cli.files import replacing
from defeat_cli.text import counted

FORMAT = "defeat"
VERSION = 2
KEYS = ("recipe", "classes", "student", "metrics")
"""Of every checkpoint. `terms`, and in last.pt `training`, may come with them."""


def save(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint of our own; a reader never sees half a file.

    Args:
        content: the keys of `KEYS`, and `training` where it can be gone on with, made of tensors, numbers, strings,
            lists and dicts only.
        keep: the name that the checkpoint in its place gets; None lets it go.

    Raises:
        OSError: as `write_atomically`.
    """
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise KeyError(f"checkpoint content lacks {', '.join(missing)}")
    folder = os.path.relpath(Path.cwd(), path.parent)
    write_atomically(path, {"format": FORMAT, "version": VERSION, "folder": folder, **content}, keep)


def write_atomically(path: Path, content: Any, keep: Path | None = None) -> None:
    """`torch.save` to a temporary name beside `path`, then rename; parent folders are made.

    The file is on the disk before it takes the place of another. It carries a checksum (CRC-32) of each of its parts,
    which `reading.read` compares.

    Raises:
        OSError: the system refuses; where the disk is full the message says how much is needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path, keep) as temporary, temporary.open("wb") as file:
            _save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(path.parent).free
            reason = f"{reason}: {mib(size_of(content))} are needed, {mib(free)} are free"
        raise OSError(error.errno, reason, str(path)) from None


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def _save(content: Any, file: BinaryIO) -> None:
    """`torch.save`, where what the system refuses arrives as such: torch wraps it in an error of its own."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        refused = error.__context__
        raise (refused if isinstance(refused, OSError) else error) from None


def size_of(content: Any) -> int:
    """Bytes of the file that `torch.save` makes of content."""
    counter = _Counter()
    torch.save(content, counter)
    return counter.size


class _Counter(io.RawIOBase):
    """A file that keeps nothing but its size."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, part: Any) -> int:
        self.size += len(part)
        return len(part)


def mib(size: int) -> str:
    """Bytes as people read them: `12.3 MiB`."""
    return f"{size / 2**20:.1f} MiB"


def matches(content: Any) -> bool:
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def checked(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The content of a native checkpoint, once it is known to be whole and of a version that we read.

    Raises:
        CheckpointError: names what is missing or newer.
    """
    version = content.get("version")
    if version not in range(1, VERSION + 1):
        raise CheckpointError(
            f"{origin}: a defeat checkpoint of version {version}; this defeat reads versions 1 to {VERSION}"
        )
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise CheckpointError(f"{origin}: a defeat checkpoint without {', '.join(missing)}")
    classes = content["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{origin}: classes should be a list of names")
    if not isinstance(content["recipe"], Mapping):
        raise CheckpointError(f"{origin}: recipe should be a mapping")
    if not isinstance(content.get("folder", ""), str):
        raise CheckpointError(f"{origin}: folder should be a path")
    if not is_state_dict(content["student"]):
        raise CheckpointError(f"{origin}: student should be a state dict")
    return dict(content)


def to_weights(content: Mapping[str, Any], origin: str, architecture: Architecture | None = None) -> Weights:
    """The detector in a native checkpoint. It knows its own architecture: the one given by the caller is not needed."""
    content = checked(content, origin)
    recipe = content["recipe"]
    if content["version"] == 1 and isinstance(recipe.get("student"), Mapping):
        recipe = {**recipe, "student": _as_built(recipe["student"])}
    classes = content["classes"]
    meaning = meaning_of_recipe(recipe, f"{origin}: the recipe in it", classes)
    return Weights(
        "native",
        dict(content["student"]),
        meaning.architecture,
        len(classes),
        classes,
        meaning.short_side,
        meaning.long_side,
        notes=[f"a defeat checkpoint: {meaning.architecture.detector}, {counted(len(classes), 'class')}"],
        recipe=recipe,
        folder=Path(origin).parent / content["folder"] if "folder" in content else None,
    )


def exported(content: Mapping[str, Any], origin: str) -> StateDict:
    """The student of a checkpoint as a plain state dict that says what it is, to be saved for use elsewhere."""
    weights = to_weights(content, origin)
    meaning = Meaning(weights.architecture, weights.classes, weights.short_side, weights.long_side)
    return with_meaning(content["student"], meaning)


def _as_built(student: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a student of version 1 that were in force."""
    built = student.get("detector") in TORCHVISION_BUILDERS
    return {name: value for name, value in student.items() if not (built and name in own_settings(student["detector"]))}


def load(path: Path) -> dict[str, Any]:
    """The content of a native checkpoint, checked.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """
    content = read(path)
    if not matches(content):
        raise CheckpointError(f"{path}: not a checkpoint of this tool")
    return checked(content, str(path))
