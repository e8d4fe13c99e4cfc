"""The same few images for every detector, with what each finds in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.detectors.modes import detecting

LOWEST, MOST = 0.3, 30
"""Score from which on a detection is shown, and how many are in one image."""
RIGHT_IOU = 0.5


@dataclass(frozen=True)
class Boxes:
    """Annotated objects or detections, best first.

    corners: [M, 4] xyxy, pixels of the image. names: of the classes. scores: [M], None for annotated objects.
    right: whether each takes an object of its class with IoU 0.5 that no better one has taken; None where they are
        the objects.
    """

    corners: Tensor
    names: list[str]
    scores: Tensor | None = None
    right: list[bool] | None = None


@dataclass(frozen=True)
class Example:
    """image: [3, H, W] uint8."""

    name: str
    image: Tensor
    truth: Boxes


def choose_examples(data: DetectionDataset, most: int) -> list[Example]:
    """Images spread evenly over a data set, of those that have objects where there are any."""
    candidates = np.unique(data.annotations.images)
    candidates = candidates if len(candidates) else np.arange(len(data))
    count = min(most, len(candidates))
    examples = []
    for index in (int(candidates[i * len(candidates) // count]) for i in range(count)):
        image, target, _ = data[index]
        names = [data.classes[label - 1] for label in target["labels"].tolist()]
        examples.append(Example(data.file_name(index), image, Boxes(target["boxes"], names)))
    return examples


def find_in(examples: Sequence[Example], detector: Any, autocast: torch.dtype | None = None) -> list[Boxes]:
    """What a detector finds in each image, one at a time as in use, with scores of `LOWEST` and above."""
    device = next(detector.parameters()).device
    found = []
    with detecting(detector, autocast):
        for example in examples:
            (output,) = detector.detect([example.image.to(device)])
            shown = (output["scores"] >= LOWEST).nonzero()[:MOST, 0]
            corners, scores, labels = (output[key][shown].float().cpu() for key in ("boxes", "scores", "labels"))
            names = [detector.classes[int(label) - 1] for label in labels]
            found.append(Boxes(corners, names, scores, taken(corners, names, example.truth)))
    return found


def taken(corners: Tensor, names: Sequence[str], truth: Boxes) -> list[bool]:
    """Whether each detection, best first, takes an object of its class: the one it overlaps most of those left."""
    overlap = box_iou(corners, truth.corners.to(corners))
    other = torch.tensor([[name != kind for kind in truth.names] for name in names], dtype=torch.bool)
    overlap[other.reshape(overlap.shape)] = 0
    right = []
    for row in range(len(corners)):
        best = int(overlap[row].argmax()) if len(truth.names) else -1
        right.append(best >= 0 and bool(overlap[row, best] >= RIGHT_IOU))
        if right[-1]:
            overlap[:, best] = 0
    return right
