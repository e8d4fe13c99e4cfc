"""Reads what is inside a checkpoint file without ever running code that the file carries.

`torch.load` with `weights_only=True` reads most files, and refuses many honest ones (loggers, numpy numbers, training
arguments). Those go through an unpickler of our own, which leaves such objects out.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from defeat_cli.checkpoints.unpickling import Placeholder, Unpickler, resolved
from defeat_cli.errors import CheckpointError
from defeat_cli.text import counted

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How `torch.save` began its files before 1.6: a pickled magic number."""


CUT_SHORT = "cut short: it begins as a checkpoint, but its end is missing"


def read(path: Path) -> Any:
    """The content of a checkpoint: containers, numbers, text and CPU tensors (numpy arrays become tensors too).

    Objects of other classes are there as `Placeholder`.

    Raises:
        CheckpointError: the file is missing, cut short, or is not a checkpoint at all; says what was found inside.
    """
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir())
        raise CheckpointError(f"{path}: a folder, not a checkpoint file. It holds {_listing(names) or 'nothing'}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(4096)
        foreign = _foreign_kind(start)
        if foreign:
            raise CheckpointError(f"{path}: not a checkpoint but {foreign}")
        if path.suffix.lower() == ".safetensors":
            return _read_safetensors(path)
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(path)
        if start.startswith(LEGACY_MAGIC):
            content = _read_by_torch(path)
            return _read_legacy(path) if content is None else content
        return _read_pickle(path, start)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _foreign_kind(start: bytes) -> str | None:
    """What else the file is, if it is something that people mistake for a checkpoint."""
    if not start:
        return "an empty file"
    head = start.lstrip()[:256].lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        title = re.search(rb"<title>(.*?)</title>", start, re.IGNORECASE | re.DOTALL)
        titled = f" ({title[1].decode(errors='replace').strip()!r})" if title else ""
        return f"an HTML page{titled}: the download gave a web page instead of the file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull` to fetch the file itself"
    if start.startswith((b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf")) or start[257:262] == b"ustar":
        return "an archive: unpack it first"
    return None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path}: needs the package safetensors: pip install 'defeat-cli[safetensors]'") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: a damaged safetensors file: {error}") from None


# --- the three kinds of file


def _read_by_torch(path: Path) -> Any:
    """What torch reads without running code; None where it says no."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)
    return None


def _read_zip(path: Path) -> Any:
    """torch.save since 1.6: a zip of `NAME/data.pkl` and `NAME/data/KEY`, one storage each."""
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: {CUT_SHORT}")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name == "data.pkl" or re.fullmatch(r"[^/]+/data\.pkl", name)]
            if any(name.endswith("/constants.pkl") for name in names):
                raise CheckpointError(f"{path}: a TorchScript program; take the state dict that it was made from")
            if not pickles:
                raise CheckpointError(f"{path}: not a checkpoint but a zip archive with {_listing(names)}")
            broken = archive.testzip()  # torch does not look
            if broken is not None:
                raise CheckpointError(f"{path}: a damaged PyTorch checkpoint: {broken} is not what was written")
            content = _read_by_torch(path)
            if content is not None:
                return content
            root = pickles[0].removesuffix("data.pkl")

            def parse() -> Any:
                if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
                    raise ValueError("it was saved on a big-endian machine")
                program = io.BytesIO(archive.read(pickles[0]))
                return resolved(Unpickler(program, lambda key: archive.read(f"{root}data/{key}")).load())

            return _guarded(path, parse)
    except CheckpointError:
        raise
    except Exception as error:  # damage makes zipfile raise whatever its bytes say: encrypted, of another compression …
        raise CheckpointError(f"{path}: a damaged PyTorch checkpoint: {error}") from error


def _read_legacy(path: Path) -> Any:
    """torch.save before 1.6: pickles in a row (magic, version, system, content, storage keys), then the storages."""

    def parse() -> Any:
        with path.open("rb") as file:
            storages: dict[str, bytes] = {}
            for _ in range(3):
                Unpickler(file).load()
            unpickler = Unpickler(file, storages.__getitem__)
            content = unpickler.load()
            for key in Unpickler(file).load():
                dtype = unpickler.storages[key].dtype
                (count,) = struct.unpack("<q", file.read(8))
                storages[key] = _exactly(file, count * dtype.itemsize)
            return resolved(content)

    return _guarded(path, parse)


def _read_pickle(path: Path, start: bytes) -> Any:
    """A plain pickle, as detectron2's model zoo has them."""

    def parse() -> Any:
        with path.open("rb") as file:
            return resolved(Unpickler(file).load())

    if not re.match(rb"\x80[\x02-\x05]|[(}\]c]", start):
        shown = start[:16].decode("ascii", "replace") if start[:16].isascii() else start[:8].hex(" ")
        raise CheckpointError(f"{path}: not a checkpoint: it begins with {shown!r}")
    return _guarded(path, parse)


def _guarded(path: Path, parse: Callable[[], Any]) -> Any:
    """`parse()`, where anything that goes wrong is the file's fault: its bytes decide what the unpickler does."""
    try:
        return parse()
    except Exception as error:
        if isinstance(error, EOFError | struct.error) or "truncated" in str(error):
            raise CheckpointError(f"{path}: {CUT_SHORT}") from error
        if isinstance(error, MemoryError):
            raise CheckpointError(f"{path}: there is not enough memory to read it, unless it is damaged") from error
        raise CheckpointError(f"{path}: a damaged or hostile checkpoint: {type(error).__name__}: {error}") from error


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count) if count >= 0 else b""
    if len(data) != count:
        raise EOFError
    return data


# --- telling what was found


def described(content: Any) -> str:
    """One line on what a checkpoint holds, for an error: keys with the kind of their values, or the tensors' names."""
    if isinstance(content, Placeholder):
        return (
            f"a whole object of class {content.origin}, which cannot be had without running code; save its state dict"
        )
    if isinstance(content, Mapping):
        if not content:
            return "an empty dict"
        if all(isinstance(value, Tensor) for value in content.values()):
            return f"{counted(len(content), 'tensor')} ({_listing([str(key) for key in content])})"
        return f"a dict with {_listing([f'{key}: {_kind(value)}' for key, value in content.items()], 12)}"
    return _kind(content)


def _kind(value: Any) -> str:
    if isinstance(value, Placeholder):
        return f"an object of class {value.origin}"
    if isinstance(value, Mapping):
        tensors = [str(key) for key, inner in value.items() if isinstance(inner, Tensor)]
        return f"{counted(len(tensors), 'tensor')} ({_listing(tensors)})" if tensors else f"a dict of {len(value)}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _listing(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
