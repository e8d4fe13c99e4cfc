"""Pictures of what each mask kind calls foreground, level by level (`defeat ablate --show-masks`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import Normalize
from torch import Tensor

from defeat_cli.detectors.contract import Anchored, Batch, Detector
from defeat_cli.distillation.masks import MASKS
from defeat_cli.errors import DataError
from defeat_cli.gradients.images import Source, detected, device_of, distinct_names, view_of
from defeat_cli.gradients.numbers import cells_of_boxes, own_area
from defeat_cli.gradients.pictures import Row, Scale, draw_panels, level_panels, shortened

BY_LEVEL = ("boxes", "gaussian")
"""Masks that take each box on one level; the others take all boxes on all levels."""


def draw_masks(
    detector: Detector,
    sources: Sequence[Source],
    output: Path,
    *,
    finest_scale: float = 56.0,
    teacher: Detector | None = None,
    threshold: float = 0.5,
) -> list[Path]:
    """Write `NAME_masks.png` for each image: every mask kind on every level of the detector's neck.

    Args:
        detector: gives image size, levels and anchors; it need not be trained.
        finest_scale: object side in pixels that the first level begins at.
        teacher: its detections stand in where there is no ground truth.
        threshold: lowest score of those.

    Returns:
        The files.

    Raises:
        DataError: an image cannot be read, or nothing says where its objects are.
    """
    detector.eval()
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for source, name in zip(sources, distinct_names(sources), strict=True):
        image = source.read()
        if source.objects is None and teacher is None:
            raise DataError(f"{source.path}: no boxes: give its ground truth, or a teacher that finds its objects")
        objects = source.objects or detected(teacher.eval(), image, threshold, "the teacher")
        batch = detector.prepare([image.to(device_of(detector))], [{"boxes": objects.boxes}])
        view = view_of(batch)
        path = output / f"{name}_masks.png"
        draw_panels(
            view,
            _rows(detector, batch, view.boxes, finest_scale),
            Scale(Normalize(0, 1), "how much a cell is foreground", strength=0.75),
            path,
            heading=f"{shortened(source.path.name, 60)} · what each mask kind takes for foreground",
            note=f"Boxes: {objects.origin}. Each panel outlines the boxes that its mask is made of.",
        )
        paths.append(path)
    return paths


@torch.no_grad()
def _rows(detector: Detector, batch: Batch, boxes: Tensor, finest_scale: float) -> list[Row]:
    """A row for each mask kind that the detector can have: without anchors there is no fine-grained mask."""
    features = detector.features(batch)
    shapes = [tuple(feature.shape[-2:]) for feature in features]
    anchors = detector.anchors(features, batch) if isinstance(detector, Anchored) else None
    own_level = [
        boxes[cells.flatten(1).any(dim=1)] for cells in cells_of_boxes(boxes, shapes, detector.strides, finest_scale)
    ]
    rows = []
    for kind, mask in MASKS.items():
        if kind == "fine-grained" and anchors is None:
            continue
        masks = mask([batch.targets[0]["boxes"]], shapes, detector.strides, finest_scale=finest_scale, anchors=anchors)
        own = own_area([level[0].float() for level in masks], batch.sizes[0], detector.strides)
        outlined = own_level if kind in BY_LEVEL else [boxes] * len(own)
        rows.append(Row(kind, level_panels(own, detector.strides, outlined)))
    return rows
