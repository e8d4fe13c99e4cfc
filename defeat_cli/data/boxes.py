"""What can be wrong with boxes, as rules over all of a data set's at once."""

from __future__ import annotations

import numpy as np

from defeat_cli.data.annotations import Annotations
from defeat_cli.data.faults import Fault

MIN_SIDE = 0.1
"""Thinner boxes, in pixels, hold nothing to learn and can vanish when resized."""
CLIP_NOTICE = 1.0
"""Boxes that leave the image by less than so many pixels are clipped without a word: COCO's own are rounded so."""
FEW_BOXES = 3
LEAVING = 0.2
"""So many boxes, all of which fit as corners where so large a share leaves the image as sides, are corners."""


def clipped_boxes(annotations: Annotations) -> tuple[np.ndarray, np.ndarray]:
    """[A, 4] float32 xyxy inside the images, and [A] bool of those that were noticeably outside.

    Args:
        annotations: with the sizes of all images.
    """
    boxes = annotations.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    limits = np.tile(_limits(annotations), 2)
    inside = boxes.clip(0, limits)
    return inside.astype(np.float32), (np.abs(inside - boxes) > CLIP_NOTICE).any(axis=1)


def without_area(clipped: np.ndarray) -> np.ndarray:
    """[A] bool, of [A, 4] boxes as `clipped_boxes` gives them."""
    return (clipped[:, 2:] - clipped[:, :2] < MIN_SIDE).any(axis=1)


def other_units(annotations: Annotations) -> list[Fault]:
    """Says that boxes are shares of the image or corners, as the set of them tells."""
    boxes = annotations.boxes
    if not len(boxes):
        return []
    limits = _limits(annotations)
    shown = f"the first is {boxes[0].round(4).tolist()}"
    far = boxes[:, :2] + boxes[:, 2:]
    if far.max() <= 1 and (boxes[:, 2:] > 0).all(axis=1).any() and limits.min() > 2:
        text = (
            f"{annotations.origin}: all its boxes are within 0..1, so they seem to be shares of the image "
            f"({shown}); boxes must be in pixels: multiply by width and height"
        )
        return [Fault("units", text)]
    as_corners = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, :2] >= -CLIP_NOTICE) & (boxes[:, 2:] <= limits + CLIP_NOTICE)
    outside = (far > limits + CLIP_NOTICE).any(axis=1)
    if len(boxes) >= FEW_BOXES and as_corners.all() and outside.mean() > LEAVING:
        text = (
            f"{annotations.origin}: {outside.sum()} of its {len(boxes)} boxes leave their images, and all fit as "
            f"corners [x1, y1, x2, y2] ({shown}); boxes must be [x, y, width, height]"
        )
        return [Fault("units", text)]
    return []


def _limits(annotations: Annotations) -> np.ndarray:
    """[A, 2] width and height of each box's image."""
    return np.array(annotations.sizes, dtype=np.float64).reshape(-1, 2)[annotations.images][:, ::-1]
