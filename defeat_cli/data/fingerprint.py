"""What a data set was when a run was begun: a resumed run on other data would be no run of either."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.unlabelled import ImageFolder
from defeat_cli.text import listed

LOOKED_AT = 1000
"""Image files, spread over the data, whose sizes on disk count; no image is opened."""

Fingerprint = dict[str, Any]


def fingerprint(data: DetectionDataset | ImageFolder) -> Fingerprint:
    """Names, sizes and annotations of a data set, as plain values: counts to be told, digests of all else."""
    if isinstance(data, ImageFolder):
        return _images(data.folder, data.names, data.sizes)
    a = data.annotations
    return {
        **_images(data.images, a.file_names, data.sizes),
        "image ids": _digest(map(repr, a.image_ids)),
        "classes": list(a.classes),
        "boxes": len(a.boxes),
        "annotations": _digest(map(np.ndarray.tobytes, (a.images, a.labels, a.boxes, a.areas, a.crowd))),
    }


def changes(then: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> list[str]:
    """What is not as it was, in words; by what data it is, e.g. `training`."""
    return [
        f"{kind} {name}: {_shown(then[kind].get(name))} then, {_shown(now[kind].get(name))} now"
        if isinstance(then[kind].get(name), int | list)
        else f"{kind} {name}: not what they were"
        for kind in then.keys() & now.keys()
        for name in then[kind]
        if then[kind].get(name) != now[kind].get(name)
    ]


def _images(folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Fingerprint:
    some = [names[i * len(names) // LOOKED_AT] for i in range(LOOKED_AT)] if len(names) > LOOKED_AT else names
    return {
        "images": len(names),
        "image names": _digest(names),
        "image sizes": _digest([np.array(sizes, dtype=np.int64).tobytes()]),
        "image files": _digest(str((folder / name).stat().st_size) for name in some),
    }


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _shown(value: Any) -> str:
    return listed(value) if isinstance(value, list) else str(value)
