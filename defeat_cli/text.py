"""Lists as people write them, for messages and tables."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[object], most: int = 8) -> str:
    """`a, b, c and 5 more`: the first `most` names, and how many others there are."""
    words = [str(name) for name in names]
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")
