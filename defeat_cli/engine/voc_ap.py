"""PASCAL VOC's own average precision."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np


def voc_ap50(
    detections: list[dict[str, Any]], ground_truth: dict[str, Any], eleven_points: bool = False
) -> dict[str, Any]:
    """VOC's average precision at IoU 0.5.

    A detection belongs to the box of its class and image that it overlaps most. It is right if IoU is at least 0.5 and
    no better-scored one took that box; if that box is difficult it does not count at all; else it is wrong.

    Args:
        detections: COCO results: `image_id`, `category_id`, `bbox` [x, y, width, height], `score`.
        ground_truth: COCO content; boxes with `iscrowd` are difficult ones.
        eleven_points: VOC2007's mean of precision at recall 0, 0.1, ..., 1; else the area under the curve (VOC2010 on).

    Returns:
        `AP50`, the mean over classes that have boxes, and `per_class`: name -> AP; fractions 0-1, -1 without boxes.
    """
    boxes = defaultdict(lambda: defaultdict(list))
    for annotation in ground_truth["annotations"]:
        boxes[annotation["category_id"]][annotation["image_id"]].append(
            (*annotation["bbox"], bool(annotation.get("iscrowd", 0)))
        )
    found = defaultdict(list)
    for detection in detections:
        found[detection["category_id"]].append(detection)
    per_class = {
        category["name"]: _class_ap(found[category["id"]], boxes[category["id"]], eleven_points)
        for category in sorted(ground_truth["categories"], key=lambda category: category["id"])
    }
    scored = [ap for ap in per_class.values() if ap >= 0]
    return {"AP50": float(np.mean(scored)) if scored else -1.0, "per_class": per_class}


def average_precision(correct: np.ndarray, positives: int, eleven_points: bool) -> float:
    """AP of detections in falling order of score.

    Args:
        correct: [D] bool.
        positives: number of boxes to be found, at least 1.
    """
    hits = np.cumsum(correct)
    recall = hits / positives
    precision = hits / np.arange(1, len(hits) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    if eleven_points:
        first = np.searchsorted(recall, np.arange(11) / 10 - 1e-12)
        return float(np.append(best_from_here, 0.0)[first].mean())
    return float((np.diff(recall, prepend=0.0) * best_from_here).sum())


def _class_ap(detections: list[dict[str, Any]], boxes: dict[Any, list[tuple]], eleven_points: bool) -> float:
    truth = {image_id: np.array(rows, dtype=np.float64) for image_id, rows in boxes.items()}
    positives = int(sum((rows[:, 4] == 0).sum() for rows in truth.values()))
    if not positives:
        return -1.0
    taken = {image_id: np.zeros(len(rows), dtype=bool) for image_id, rows in truth.items()}
    correct = []
    for detection in sorted(detections, key=lambda detection: -detection["score"]):
        image_id = detection["image_id"]
        hit = False
        if image_id in truth:
            overlaps = _iou(np.array(detection["bbox"], dtype=np.float64), truth[image_id])
            best = int(overlaps.argmax())
            if overlaps[best] >= 0.5:
                if truth[image_id][best, 4]:
                    continue
                hit = not taken[image_id][best]
                taken[image_id][best] = True
        correct.append(hit)
    return average_precision(np.array(correct, dtype=bool), positives, eleven_points)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of one xywh box with each of [M, 4+]."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:4])
    shared = (high - low).clip(min=0).prod(axis=1)
    return shared / np.maximum(box[2:].prod() + others[:, 2:4].prod(axis=1) - shared, 1e-12)
