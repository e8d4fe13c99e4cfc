"""One process at a time in a folder. Who only reads is not held up."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from defeat_cli.errors import RunError

try:
    import fcntl
except ImportError:  # not on Windows, where what the file says has to do
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)

_open: set[IO[str]] = set()


def _close_in_child() -> None:
    """A lock is held as long as any process has its file open: a forked loader process must not outlive us with it."""
    for file in _open:
        file.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Hold a folder, which is made where it is missing, for this process; yields what children that work in it inherit.

    The system lets go of the lock with the last process that has it, however that ends; the file that is then left is
    taken over. On disks that know no locks the process that the file names is looked for, which only works on its host.

    Raises:
        RunError: another process holds it; names host and process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with _gained(path) as file:
        _open.add(file)
        try:
            file.seek(0)
            file.truncate()
            with suppress(OSError):  # on a full disk the lock holds all the same
                file.write(f"{socket.gethostname()} {os.getpid()}\n")
                file.flush()
            yield file.fileno() if fcntl is not None else None
        finally:
            _open.discard(file)
            file.close()
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a lock's file, unless a child, or whoever came after us, still holds it."""
    with suppress(OSError, RunError), _gained(path):
        path.unlink()


def refuse_locked(folder: Path) -> None:
    """Refuse a folder that another process holds, before the work begins for which `locked` will hold it.

    Raises:
        RunError: as `locked`.
    """
    if (folder / LOCK).exists():
        with locked(folder):
            pass


def _gained(path: Path) -> IO[str]:
    """The lock's open file, once it is ours."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _gain(file, path)
            # Whoever held it before may have removed it since we opened it.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _gain(file: IO[str], path: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no locks here")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        host, _, process = file.read().strip().partition(" ")
        if error.errno not in _HELD_BY_ANOTHER and not _may_live(host, process):
            return
        holder = f"process {process} on {host}" if process else "another process"
        hint = "" if error.errno in _HELD_BY_ANOTHER else f". If it is gone, delete {path}"
        raise RunError(f"{path.parent}: {holder} is at work in this folder; wait for it, or stop it{hint}") from None


def _may_live(host: str, process: str) -> bool:
    """Whether a process that a lock names may still be there; of other hosts nobody knows."""
    if not process.isdigit() or int(process) == os.getpid():
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
