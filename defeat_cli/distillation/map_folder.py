"""A frozen detector's maps in files, so that the runs of a study, each a process of its own, compute them once."""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import torch
import torchvision
from torch import Tensor

import defeat_cli
from defeat_cli.detectors.contract import TorchvisionDetector

Key = tuple[bytes, torch.Size, tuple[int, int], torch.dtype]
"""Digest of an image's pixels, their shape, the image's (height, width), and the dtype of its maps."""

ROOM = 16 * 2**30
"""Bytes of the disk that are left to others."""

OWN = re.compile(r"[0-9a-f]{32}(\.\w+)?")
"""Names that are ours: of a detector's folder, of files, temporary ones too."""

DIGEST = 32
"""Bytes with which a file begins: the digest of all that follows, which torch does not check."""


class MapFolder:
    """Maps of images on a CPU, a file each, in a folder for each detector and whatever else their last bits depend on.

    A full disk or a damaged file costs the time that it would have spared, and no more.

    Args:
        parent: folder of all detectors; need not be there.
        place: which maps.
    """

    def __init__(self, parent: Path, detector: TorchvisionDetector, place: str) -> None:
        self.path, self._spared = parent / _fingerprint(detector, place), 0.0

    def read(self, key: Key) -> list[Tensor] | None:
        """The maps of an image; None where none are there, or not whole."""
        began, stored = time.perf_counter(), {"levels": None, "seconds": 0.0}
        with suppress(OSError):
            content = self._file(key).read_bytes()
            if blake2b(content[DIGEST:], digest_size=DIGEST).digest() == content[:DIGEST]:
                stored = torch.load(io.BytesIO(content[DIGEST:]), weights_only=True)
        self._spared += stored["seconds"] - (time.perf_counter() - began)
        return stored["levels"]

    def write(self, key: Key, levels: list[Tensor], seconds: float) -> None:
        """Keep the maps of an image, which took so long to compute."""
        began = time.perf_counter()
        file = self._file(key)
        temporary = file.with_suffix(f".{os.getpid()}")  # processes may write the same image at once
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.path).free > ROOM:
                buffer = io.BytesIO()
                torch.save({"levels": levels, "seconds": seconds}, buffer)
                content = buffer.getvalue()
                temporary.write_bytes(blake2b(content, digest_size=DIGEST).digest() + content)
                os.replace(temporary, file)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
        self._spared -= time.perf_counter() - began

    def take_spared(self) -> float:
        """Seconds that computing what was found had taken, less those of reading and writing, since the last call."""
        taken, self._spared = self._spared, 0.0
        return taken

    def _file(self, key: Key) -> Path:
        return self.path / f"{blake2b(repr(key).encode(), digest_size=16).hexdigest()}.pt"


def remove(parent: Path) -> None:
    """Remove what any `MapFolder` has kept below a folder, and the folder itself where nothing else is in it."""
    for folder in filter(_is_own, parent.glob("*")):
        with suppress(OSError):
            for file in filter(_is_own, folder.glob("*")):
                file.unlink()
            folder.rmdir()
    with suppress(OSError):
        parent.rmdir()


def _is_own(path: Path) -> bool:
    return OWN.fullmatch(path.name) is not None


def _fingerprint(detector: TorchvisionDetector, place: str) -> str:
    """32 hexadecimal digits."""
    versions = defeat_cli.__version__, torch.__version__, torchvision.__version__
    where = platform.node(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    digest = blake2b(repr((place, versions, where, detector)).encode(), digest_size=16)
    for name, value in detector.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
