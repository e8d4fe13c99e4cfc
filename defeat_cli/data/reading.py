"""Text files of any common encoding, and JSON files of any size."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

from defeat_cli.errors import DataError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks and what they announce; UTF-16's little-endian one begins UTF-32's, so it comes later."""
CHUNK = 1 << 20
SPACE = " \t\n\r"


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError: a name with a NUL in it
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in what its byte order mark says.

    Raises:
        DataError: it cannot be read, or is in another encoding (with the line).
    """
    return decoded(read_bytes(path), path)


def decoded(content: bytes, path: Path, encoding: str = "utf-8") -> str:
    """Bytes as text, in what their byte order mark says, else in `encoding`.

    Raises:
        DataError: the bytes are no such text, or nobody knows that encoding.
    """
    mark, encoding = next((known for known in MARKS if content.startswith(known[0])), (b"", encoding))
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: len(mark) + error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not text in {encoding.upper()}; save the file in UTF-8") from None
    except (LookupError, ValueError):
        raise DataError(
            f"{path}: says that it is in {encoding}, an encoding that is not known; save it in UTF-8"
        ) from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends; file names in them may hold every character but a newline."""
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        DataError: it cannot be read, or is no YAML (with the line).
    """
    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: a date like 2020-13-41
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise DataError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read, or is no JSON (with the line).
    """
    content = read_bytes(path)
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid JSON: not text in UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise DataError(f"{path}: not JSON that can be read: {error}") from None


def stream_json(path: Path, take: Callable[[str, int, Any], Any]) -> dict[str, Any] | None:
    """A JSON object whose lists are read entry by entry, without the whole text or content in memory.

    Args:
        take: given a key of the object, a position in its list and the entry there; what it returns is kept.

    Returns:
        The object; None where the file is anything else, or broken: `read_json` then says what it is.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _Stream(file).object(take)
    except (OSError, ValueError, RecursionError):
        return None


class _Stream:
    """The values of a JSON text in turn, with a window of it in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.window = ""
        self.at = 0
        self.decode = json.JSONDecoder().raw_decode

    def object(self, take: Callable[[str, int, Any], Any]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        self._expect("{")
        while self._next() != "}":
            if content:
                self._expect(",")
            key = self._value()
            if not isinstance(key, str):
                raise ValueError("a key is no text")
            self._expect(":")
            if self._next() == "[":
                content[key] = [take(key, i, entry) for i, entry in enumerate(self._entries())]
            else:
                content[key] = self._value()
        self._expect("}")
        if self._next():
            raise ValueError("text after the end")
        return content

    def _entries(self) -> Iterator[Any]:
        self._expect("[")
        more = self._next() != "]"
        while more:
            yield self._value()
            if self.window.startswith(", ", self.at):  # as nearly every file has it: a shortcut for the next two lines
                self.at += 2
            elif more := self._next() == ",":
                self.at += 1
        self._expect("]")

    def _value(self) -> Any:
        if self.window[self.at : self.at + 1] != "{":
            self._next()
        while True:
            try:
                value, end = self.decode(self.window, self.at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            # What touches the window's end may go on behind it, as a number does.
            if end < len(self.window) or not self._more():
                self.at = end
                return value

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.window):
                return self.window[self.at]
            if not self._more():
                return ""

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"no {character}")
        self.at += 1

    def _more(self) -> bool:
        """A longer window, by as much as it holds already at least, so that a long value is not decoded too often."""
        self.window = self.window[self.at :]
        self.at = 0
        chunk = self.file.read(max(CHUNK, len(self.window)))
        self.window += chunk
        return bool(chunk)
