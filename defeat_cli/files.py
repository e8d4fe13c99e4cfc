"""Files written whole: to a temporary name beside, then renamed, so that a reader never sees half of one.

And whether they can be written at all, found out before the work whose result they are to hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from defeat_cli.errors import RunError


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place on success and is removed on failure.

    Args:
        keep: the name that the file in its place gets; None lets it go.

    Raises:
        OSError: the system refuses; names the file.
    """
    temporary = temporary_of(path)
    try:
        yield temporary
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """The name under which a file is written; only a process that was killed leaves one."""
    return path.with_name(f".{path.stem}.tmp{path.suffix}")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def require_place_for_file(path: Path) -> None:
    """Refuse a path that no file can be written to; writes nothing.

    Raises:
        RunError: it is a folder, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise RunError(f"{path}: is a folder; name a file to write to")
    _require_place(path.parent, path)


def require_place_for_folder(folder: Path) -> None:
    """Refuse a path that no files can be written below; writes nothing.

    Raises:
        RunError: it, or what it is to be made in, is a file or cannot be written to.
    """
    _require_place(folder, folder)


def _require_place(folder: Path, named: Path) -> None:
    place = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), Path())
    if not place.is_dir():
        raise RunError(f"{named}: {place} is no folder, so nothing can be written there; name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"{named}: {place} cannot be written to: no permission, or a read-only disk; name another place")
