"""Parts of a data set: images set apart for validation, and some of its classes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from defeat_cli.data.annotations import Annotations
from defeat_cli.errors import DataError
from defeat_cli.text import counted, listed


def divide(annotations: Annotations, split: str, fraction: float, seed: int) -> Annotations:
    """The training or the validation images of a data set that is not divided.

    Which images go where depends on their file names and the seed alone.

    Args:
        split: `train` or `val`.
        fraction: share of the images that validate; at least one image goes to either side.

    Raises:
        DataError: there are fewer than two images.
    """
    total = len(annotations.file_names)
    if total < 2:
        raise DataError(f"{annotations.origin}: has {counted(total, 'image')}; data.val_fraction needs two at least")
    by_name = np.array(sorted(range(total), key=annotations.file_names.__getitem__))
    shuffled = by_name[np.random.default_rng(seed).permutation(total)]
    count = min(max(round(fraction * total), 1), total - 1)
    chosen = np.sort(shuffled[:count] if split == "val" else shuffled[count:])
    note = f"data.val_fraction sets {count} of {total} images apart for validation"
    return annotations.of_images(chosen, note)


def keep_classes(annotations: Annotations, names: Sequence[str]) -> Annotations:
    """The same images with the boxes of some classes, in the order that the data has them.

    Raises:
        DataError: a name that is no class of the data.
    """
    for name in names:
        if name not in annotations.classes:
            close = difflib.get_close_matches(name, annotations.classes, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {listed(annotations.classes, 10)}"
            raise DataError(f"data.classes: {annotations.origin} has no class {name!r}; {hint}")
    kept = [label for label, name in enumerate(annotations.classes, start=1) if name in names]
    new_label = np.zeros(len(annotations.classes) + 1, dtype=np.int64)
    new_label[kept] = np.arange(1, len(kept) + 1)
    rows = np.flatnonzero(new_label[annotations.labels])
    dropped = len(annotations.labels) - len(rows)
    keeps = f"{len(kept)} of {counted(len(annotations.classes), 'class')}"
    note = f"data.classes keeps {keeps}; {counted(dropped, 'box')} of others left out"
    return dataclasses.replace(
        annotations,
        classes=[annotations.classes[label - 1] for label in kept],
        category_ids=[annotations.category_ids[label - 1] for label in kept],
        notes=(*annotations.notes, note),
        **annotations.columns(rows, labels=new_label[annotations.labels[rows]]),
    )
