"""Time that parts take when they run in turn, so that a busy machine slows all of them alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds that named parts took, each timed from one standstill of the device to the next.

    seconds: name -> one value a round, in the order in which they were measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add what happens inside to a part."""
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def forget(self) -> None:
        """Begin anew, after a warm-up."""
        self.seconds = {}

    def spread(self, name: str) -> Spread:
        """What was measured of a part."""
        return Spread.of(self.seconds[name])


@dataclass(frozen=True)
class Spread:
    """Milliseconds over the rounds: the least, the median, and what 95% of the rounds do not exceed."""

    least: float
    median: float
    p95: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        ordered = sorted(1000 * value for value in seconds)
        # The smallest value that at least 95% of the values do not exceed.
        last = -(-95 * len(ordered) // 100) - 1
        return cls(ordered[0], statistics.median(ordered), ordered[last])


def machine(device: torch.device) -> dict[str, str | int]:
    """What figures were measured on, and with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    """The processor's name as the system gives it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
