"""A frozen detector's maps in files, so that the runs of a study, each a process of its own, compute them once."""

from __future__ import annotations

import os
import pickle
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from shutil import disk_usage

import torch
import torchvision
from torch import Tensor

from defeat_cli.detectors.contract import Detector

Key = tuple[bytes, torch.Size, tuple[int, int], torch.dtype]
"""Digest of an image's pixels, their shape, the image's (height, width), and the dtype of its maps."""

ROOM = 4 * 2**30
"""Bytes of the disk that are left to others."""


@dataclass(frozen=True)
class Stored:
    """Maps as the process that computed them had them, and the seconds that this took."""

    levels: list[Tensor]
    seconds: float


class MapFolder:
    """Maps of images, a file each, in a folder for each detector and whatever else their last bits depend on.

    A full disk or a damaged file costs the time that it would have spared, and no more.

    Args:
        parent: folder of all detectors; need not be there.
        place: which maps.
        device: that computes them.
    """

    def __init__(self, parent: Path, detector: Detector, place: str, device: torch.device) -> None:
        self.path, self.device = parent / _fingerprint(detector, place, device), device

    def read(self, key: Key) -> Stored | None:
        """What is there of an image, on the device; None where nothing is, or nothing that can be read."""
        try:
            return Stored(**torch.load(self._file(key), map_location=self.device, weights_only=True))
        except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError):
            return None

    def write(self, key: Key, levels: list[Tensor], began: float) -> None:
        """Keep an image's maps, whose computation began at this time of `time.perf_counter`."""
        file = self._file(key)
        temporary = file.with_suffix(f".{os.getpid()}")  # processes may write the same image at once
        levels = [level.cpu() for level in levels]
        content = {"levels": levels, "seconds": time.perf_counter() - began}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if disk_usage(self.path).free > ROOM:
                torch.save(content, temporary)
                os.replace(temporary, file)
        except (OSError, RuntimeError):  # torch's own writer raises the latter
            with suppress(OSError):
                temporary.unlink()

    def _file(self, key: Key) -> Path:
        return self.path / f"{blake2b(repr(key).encode(), digest_size=16).hexdigest()}.pt"


def _fingerprint(detector: Detector, place: str, device: torch.device) -> str:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    versions = torch.__version__, torchvision.__version__
    digest = blake2b(repr((place, device.type, hardware, torch.get_num_threads(), versions)).encode(), digest_size=16)
    digest.update(repr(detector).encode())
    for name, value in detector.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
