"""Ways to spoil what a user may hand to the tool, as Hypothesis strategies: bytes, text, and values at any depth."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from hypothesis import strategies as st

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, 2**31, 2**53 + 1, 2**70, 10**400, 1e308, -1e308, math.nan, math.inf, -math.inf,
    "", " ", "1", "-1", "NaN", "auto", "dog", "a.jpg", "../a.jpg", "/", "..", "a\0b", "\ud800", "x" * 5000, "ä\n",
    "[/]", "~", "cuda", "cuda:-1", "no such thing", [], {}, [[]], [0], [1, 2, 3, 4], [None], ["dog", "dog"], {"id": 1},
    {"": None}, {"a": {"b": []}},
)  # fmt: skip
TOKENS = (
    "null", "~", "true", "yes", "0", "-1", "1e400", ".nan", ".inf", "0x10", "1_000", "[", "{", "}", ":", "- ", "&a",
    "*a",
    "!!python/object/apply:os.system [true]", "!!binary aGk=", "<<: *a", "|", ">", "'", '"', "#", "---", "...", "\t",
    "2026-01-01", "12:30:00", "\0", "\u2028", "\ud83d", "=", "%", "@", "`",
)  # fmt: skip
OBJECTS: tuple[Any, ...] = (
    torch.zeros(0), torch.zeros(3), torch.tensor(1.0), torch.full((2, 2), math.nan), torch.arange(4),
    torch.zeros(1, 3, dtype=torch.complex64), torch.zeros(2, dtype=torch.bool), b"bytes", (), (1, 2), {1, 2}, 1j,
)  # fmt: skip
"""What a checkpoint may hold besides `VALUES`."""


@st.composite
def spoiled_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes cut off, changed, put in, dropped or doubled, a few times."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        # Formats begin and end with what tells most about the rest.
        near = draw(st.integers(0, min(300, len(content))))
        at = draw(st.sampled_from([near, len(content) - near, draw(st.integers(0, len(content)))]))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64]))
        action = draw(st.sampled_from(["cut", "change", "change", "flip", "insert", "drop", "double"]))
        if action == "cut":
            del content[at:]
        elif action == "change":
            content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif action == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif action == "drop":
            del content[at : at + length]
        elif action == "double":
            content[at:at] = content[at : at + length]
    return bytes(content)


@st.composite
def spoiled_text(draw: st.DrawFn, original: str) -> str:
    """Words and lines of a text changed, repeated, dropped or moved."""
    lines = original.split("\n")
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.integers(0, len(lines) - 1))
        action = draw(st.sampled_from(["drop", "repeat", "indent", "word", "word", "word", "token"]))
        if action == "drop" and len(lines) > 1:
            del lines[row]
        elif action == "repeat":
            lines.insert(draw(st.integers(0, len(lines))), lines[row])
        elif action == "indent":
            lines[row] = draw(st.sampled_from(["", " ", "    ", "\t"])) + lines[row].lstrip()
        else:
            gap = draw(st.sampled_from([" ", ":", ",", "["]))
            words = lines[row].split(gap)
            new = draw(st.sampled_from(TOKENS) if action == "token" else st.text(max_size=12))
            words[draw(st.integers(0, len(words) - 1))] = new
            lines[row] = gap.join(words)
    return "\n".join(lines)


@st.composite
def spoiled_tree(draw: st.DrawFn, original: Any, values: tuple[Any, ...] = VALUES) -> Any:
    """Nested dicts and lists with values replaced, keys taken out, misspelt or given to others, at any depth."""
    root = {"": copy.deepcopy(original)}
    for _ in range(draw(st.integers(1, 3))):
        place, key = root, ""
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 6)):
            place = place[key]
            key = (
                draw(st.sampled_from(list(place))) if isinstance(place, dict) else draw(st.integers(0, len(place) - 1))
            )
        action = draw(st.sampled_from(["replace", "replace", "replace", "take out", "rename", "double"]))
        if action == "replace" or place is root:
            new = draw(st.sampled_from(values) | st.integers() | st.floats() | st.text(max_size=8))
            place[key] = copy.deepcopy(new)
        elif isinstance(place, list):
            place.append(copy.deepcopy(place[key])) if action == "double" else place.pop(key)
        elif action == "take out":
            del place[key]
        else:
            value = copy.deepcopy(place[key]) if action == "double" else place.pop(key)
            place[draw(st.sampled_from([*map(str, place), "x"]) | st.text(max_size=5))] = value
    return root[""]
