"""What data a run is trained on, kept in its last checkpoint, so that none goes on with other data unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.unlabelled import ImageFolder
from defeat_cli.errors import RunError

Record = dict[str, dict[str, Any]]

NAMES = {
    "images": "number of images",
    "boxes": "number of boxes",
    "left_out": "images left out by data.on_bad_image",
    "annotated": "names, sizes, classes or boxes",
}
"""Parts of a record without which a resumed run would be another run, in words."""


def data_record(train: DetectionDataset, val: DetectionDataset, unlabelled: ImageFolder | None = None) -> Record:
    """What tells data from other data, by split.

    Returns:
        `images`, `boxes`, `left_out` (files, by `data.on_bad_image`), `annotated` (a digest of names, sizes, classes
        and boxes in their order) and `pixels` (one of the decoded images; None where only headers were read).
    """
    record = {"training": _of(train), "validation": _of(val)}
    if unlabelled is not None:
        annotated = _digest(unlabelled.names, unlabelled.sizes)
        record["unlabelled"] = {"images": len(unlabelled), "annotated": annotated, "pixels": None}
    return record


def refuse_other_data(before: Mapping[str, Mapping[str, Any]], record: Record, origin: str) -> list[str]:
    """Refuse to go on with a run whose data was another.

    Args:
        before: the record of the run; of one that has none it is empty, and nothing is refused.
        origin: what messages call the run.

    Returns:
        Warnings: images that are others under the same names, as when a broken one was replaced.

    Raises:
        RunError: images, boxes or classes are others; says which.
    """
    differing, warnings = [], []
    for split in before.keys() & record.keys():
        there, here = before[split], record[split]
        for name, what in NAMES.items():
            old, new = there.get(name), here.get(name)
            if old != new:
                shown = f": {old} then, {new} now" if isinstance(new, int) else ""
                differing.append(f"{split}: other {what}{shown}")
        if there["pixels"] != here["pixels"] and None not in (there["pixels"], here["pixels"]):
            warnings.append(f"{origin}: some {split} images have other pixels than when the run was saved")
    if differing:
        text = f"{origin}: the data is not what the run was begun with; bring it back, or start again with --overwrite:"
        raise RunError("\n  ".join([text, *sorted(differing)]))
    return sorted(warnings)


def _of(data: DetectionDataset) -> dict[str, Any]:
    known = data.annotations
    columns = (known.images, known.labels, known.boxes, known.areas, known.crowd)
    return {
        "images": len(data),
        "boxes": len(known.labels),
        "left_out": sorted(os.path.relpath(fault.image, data.images) for fault in data.left_out),
        "annotated": _digest(known.file_names, data.sizes, known.classes, *columns),
        "pixels": None if data.digests is None else _digest(data.digests),
    }


def _digest(*parts: Any) -> str:
    whole = hashlib.sha256()
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, ensure_ascii=True).encode()
        whole.update(content + b"\n")
    return whole.hexdigest()[:16]
