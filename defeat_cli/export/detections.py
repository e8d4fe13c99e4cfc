"""What was found in images, and the files that labelling tools and trainers read: COCO, YOLO, crops."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Found:
    """The detections in one image, best first.

    name: without suffix; no other image of the same prediction has it.
    size: (height, width).
    boxes: [M, 4] float32 xyxy, pixels. scores: [M]. labels: [M] in 1..K.
    """

    name: str
    path: Path
    size: tuple[int, int]
    boxes: Tensor
    scores: Tensor
    labels: Tensor


def coco_content(images: Sequence[Found], classes: Sequence[str]) -> dict[str, Any]:
    """A COCO file: `annotations` are the detections with their `score`, so that it serves as results and as labels."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    for image_id, found in enumerate(images, start=1):
        height, width = found.size
        content["images"].append({"id": image_id, "file_name": found.path.name, "height": height, "width": width})
        sides = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], dim=1)
        for box, score, label in zip(sides.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return content


def yolo_text(found: Found) -> str:
    """A YOLO label file: a line a box, `class x y w h`, classes from 0, centre and size as fractions of the image."""
    height, width = found.size
    scale = torch.tensor([width, height, width, height])
    x1, y1, x2, y2 = (found.boxes / scale).unbind(1)
    rows = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1).tolist()
    return "".join(
        " ".join([str(label - 1), *(f"{value:.6f}" for value in row)]) + "\n"
        for label, row in zip(found.labels.tolist(), rows, strict=True)
    )


def crops(image: Tensor, found: Found, classes: Sequence[str]) -> list[tuple[str, Image.Image]]:
    """What is inside each box, whole pixels, with a file name: image, number and class.

    Args:
        image: [3, H, W] uint8.
    """
    height, width = found.size
    pictures = []
    for number, (box, label) in enumerate(zip(found.boxes.tolist(), found.labels.tolist(), strict=True), start=1):
        left, top = (
            min(max(0, math.floor(side)), most - 1) for side, most in zip(box[:2], (width, height), strict=True)
        )
        right, bottom = (max(1 + low, math.ceil(side)) for side, low in zip(box[2:], (left, top), strict=True))
        inside = image[:, top:bottom, left:right].permute(1, 2, 0).contiguous().numpy()
        kind = re.sub(r"[^\w-]+", "_", classes[label - 1])
        pictures.append((f"{found.name}_{number}_{kind}.png", Image.fromarray(inside)))
    return pictures
