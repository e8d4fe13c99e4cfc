"""Small pieces of messages."""

from __future__ import annotations

import math
from collections.abc import Iterable


def listed(names: Iterable[object], most: int = 8) -> str:
    """The first names of many: `a, b, c and 5 more`."""
    names = [str(name) for name in names]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 step`, `1,200 steps`, `1 class`, `3 classes`; many: where the plural is made otherwise, `2 boxes reach`."""
    plural = many or (f"{one}es" if one.endswith(("s", "x")) else f"{one}s")
    return f"{number:,} {one if number == 1 else plural}"


def out_of(part: int, whole: int, noun: str, one: str, many: str) -> str:
    """`1 of 3 images is`, `2 of 3 images are`: noun `image`, one `is`, many `are`."""
    return f"{part:,} of {counted(whole, noun)} {one if part == 1 else many}"


def spoken_size(size: float) -> str:
    """Bytes as `40 MiB` or `1.5 GiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20)} MiB"


def spoken_duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
