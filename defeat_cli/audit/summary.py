"""What a data set is like, in a line."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from defeat_cli.audit.anchors import input_boxes
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.text import counted, listed

MOST_CLASSES = 6


def facts(data: DetectionDataset, short_side: int, long_side: int) -> dict[str, Any]:
    """Figures of a data set as plain values.

    Returns:
        `images`, `without_boxes` (images), `boxes` (all that are annotated), `crowds`, `classes` (name -> boxes, crowds
        not among them), `image_sizes` (`WxH` -> images), `box_size` (root of the area in pixels after resizing:
        `smallest`, `median`, `largest`; None without boxes).
    """
    known = data.annotations
    counts = np.bincount(known.labels[~known.crowd], minlength=len(data.classes) + 1)[1:]
    sizes = Counter(f"{width}x{height}" for height, width in data.sizes)
    boxes = np.sqrt(input_boxes(data, short_side, long_side).sides.prod(axis=1))
    figures = {"smallest": boxes.min, "median": lambda: np.median(boxes), "largest": boxes.max}
    return {
        "images": len(data),
        "without_boxes": int(len(data) - len(np.unique(data.boxes[1]))),
        "boxes": len(known.labels),
        "crowds": int(known.crowd.sum()),
        "classes": dict(zip(data.classes, counts.tolist(), strict=True)),
        "image_sizes": dict(sizes.most_common()),
        "box_size": {name: round(float(of()), 1) for name, of in figures.items()} if len(boxes) else None,
    }


def in_words(figures: dict[str, Any]) -> str:
    """`292 images of 640x480; 3,941 boxes, 12 to 310 pixels after resizing (median 97); 3 classes: RBC 3,371, …`."""
    sizes = list(figures["image_sizes"])
    sides = np.array([[int(side) for side in size.split("x")] for size in sizes])
    (narrow, low), (wide, high) = sides.min(axis=0), sides.max(axis=0)
    shown = f"of {sizes[0]}" if len(sizes) == 1 else f"of {narrow}x{low} to {wide}x{high}"
    counts = sorted(figures["classes"].items(), key=lambda item: -item[1])
    classes = listed([f"{name} {count:,}" for name, count in counts], MOST_CLASSES)
    size = figures["box_size"]
    pixels = f", {size['smallest']:.0f} to {size['largest']:.0f} pixels after resizing (median {size['median']:.0f})"
    empty = f" ({figures['without_boxes']} without a box)" if figures["without_boxes"] else ""
    return (
        f"{counted(figures['images'], 'image')} {shown}{empty}; {counted(figures['boxes'], 'box')}"
        f"{pixels if size else ''}; "
        f"{counted(len(counts), 'class')}: {classes}"
    )
