"""What data a run was trained on, kept in its folder: a resumed run must not go on with other data unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.unlabelled import ImageFolder
from defeat_cli.engine.runs import DATA, LAST, RunFolder, write_json
from defeat_cli.errors import RunError


def data_record(
    train: DetectionDataset, val: DetectionDataset, unlabelled: ImageFolder | None = None
) -> dict[str, dict[str, Any]]:
    """What tells data from other data, by split.

    Returns:
        `images`, `boxes`, `left_out` (files, by `data.on_bad_image`), `annotated` (a digest of names, sizes, classes
        and boxes in their order) and `pixels` (one of the decoded images; None where only headers were read).
    """
    record = {"training": _of(train), "validation": _of(val)}
    if unlabelled is not None:
        record["unlabelled"] = {
            "images": len(unlabelled), "annotated": _digest(unlabelled.names, unlabelled.sizes)
        }  # fmt: skip
    return record


def refuse_other_data(run: RunFolder, record: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to go on with a run whose data was another.

    Raises:
        RunError: says what differs. Not where nothing is saved yet to go on from, nor for runs without a record.
    """
    if not (run / DATA).is_file() or not (run / LAST).is_file():
        return
    before = json.loads((run / DATA).read_text(encoding="utf-8"))
    differing = []
    for split in record:
        there, here = before.get(split, {}), record[split]
        for name, what in NAMES.items():
            old, new = there.get(name), here.get(name)
            if old != new and (name != "pixels" or None not in (old, new)):
                shown = f": {old} then, {new} now" if isinstance(new, int) else ""
                differing.append(f"{split}: other {what}{shown}")
    if differing:
        remedy = (
            f"bring the data back, start again with --overwrite, or delete {run / DATA} to go on with other data all "
            "the same"
        )
        raise RunError(
            "\n  ".join([f"{run.path}: the data is not what the run was begun with:", *differing, f"So {remedy}"])
        )


NAMES = {
    "images": "number of images",
    "boxes": "number of boxes",
    "left_out": "images left out by data.on_bad_image",
    "annotated": "names, sizes, classes or boxes",
    "pixels": "pixels of the images",
}
"""Parts of a record, in words."""


def keep(run: RunFolder, record: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the record into a run's folder, but not over one that says more: it is of the same data."""
    if not (run / DATA).is_file() or record["training"]["pixels"] is not None:
        write_json(run / DATA, record)


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
