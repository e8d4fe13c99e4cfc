"""Images that were decoded whole before, remembered in the user's cache folder so that they are not decoded again.

One file for each folder of images, shared by all runs on this machine. An image is known while its file has the size
and time of change that it had. What is broken is never remembered: it is looked at again each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from defeat_cli.files import replacing

VERSION = 1
"""Raise it when what is remembered would no longer be true of the same files."""


class Stamp(NamedTuple):
    """What tells a file from what it was, and (height, width) as its image is used."""

    bytes: int
    changed: int
    height: int
    width: int


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/defeat`, by default `~/.cache/defeat`; None where there is no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "defeat"
    try:
        return Path.home() / ".cache" / "defeat"
    except RuntimeError:
        return None


class KnownImages:
    """What is known of a folder's images.

    Args:
        folder: that names are relative to.
        beneath: where the file is kept; None keeps nothing.
    """

    def __init__(self, folder: Path, beneath: Path | None) -> None:
        key = hashlib.sha1(os.fsencode(os.path.realpath(folder))).hexdigest()
        self.file = beneath and beneath / "images" / f"{key}.{VERSION}.npz"
        self.rows = self._read()
        self.new: dict[str, tuple[int, ...]] = {}

    def digest(self, name: str, stamp: Stamp) -> int | None:
        """Of an image's pixels, where it was decoded before as it is now."""
        row = self.rows.get(name)
        return row[4] if row is not None and row[:4] == stamp else None

    def add(self, name: str, stamp: Stamp, digest: int) -> None:
        """Remember that an image was decoded."""
        self.new[name] = (*stamp, digest)

    def save(self) -> None:
        """Write what is new; where that cannot be written, nothing is remembered, which does no harm."""
        if self.file is None or not self.new:
            return
        self.rows = self._read() | self.new  # another run may have written meanwhile
        names = [name for name in self.rows if "\0" not in name]
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as temporary:
                np.savez(
                    temporary,
                    names=np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8),
                    rows=np.array([self.rows[name] for name in names], dtype=np.int64),
                )

    def _read(self) -> dict[str, tuple[int, ...]]:
        if self.file is None or not self.file.is_file():
            return {}
        try:
            with np.load(self.file, allow_pickle=False) as content:
                names = os.fsdecode(content["names"].tobytes()).split("\0")
                rows = content["rows"]
            if rows.shape != (len(names), 5):
                return {}
            return dict(zip(names, map(tuple, rows.tolist()), strict=True))
        except Exception:  # damage makes zipfile raise whatever its bytes say: encrypted, of another compression …
            return {}  # written anew
