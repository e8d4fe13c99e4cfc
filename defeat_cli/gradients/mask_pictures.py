"""Pictures of what each mask kind calls foreground, level by level (`defeat ablate --show-masks`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from defeat_cli.detectors.contract import Batch, Detector
from defeat_cli.distillation.masks import MASKS, valid_masks
from defeat_cli.errors import DataError
from defeat_cli.gradients.images import Source, detected, device_of, distinct_names, view_of
from defeat_cli.gradients.numbers import boxes_by_level, level_name, own_area
from defeat_cli.gradients.pictures import Panel, Row, Scale, draw_panels

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
        target = {"boxes": objects.boxes.to(device_of(detector))}
        batch = detector.prepare([image.to(device_of(detector))], [target])
        view = view_of(batch)
        path = output / f"{name}_masks.png"
        draw_panels(
            view,
            _rows(detector, batch, finest_scale),
            Scale(1.0, "how much a cell is foreground", strength=0.75),
            path,
            heading=f"{source.path.name} · what each mask kind takes for foreground",
            note=f"Boxes: {objects.origin}. Each panel outlines the boxes that its mask is made of.",
            boxes=f"image, {len(view.boxes)} boxes",
        )
        paths.append(path)
    return paths


@torch.no_grad()
def _rows(detector: Detector, batch: Batch, finest_scale: float) -> list[Row]:
    """A row for each mask kind."""
    features = detector.features(batch)
    shapes = [tuple(feature.shape[-2:]) for feature in features]
    boxes = batch.targets[0]["boxes"]
    anchors = detector.anchors(features, batch)
    valid = [mask[0] for mask in valid_masks(batch.valid, shapes)]
    outlined = boxes_by_level(boxes.cpu().numpy(), shapes, detector.strides, finest_scale)
    rows = []
    for kind, mask in MASKS.items():
        masks = mask([boxes], shapes, detector.strides, finest_scale=finest_scale, anchors=anchors)
        own = own_area([level[0].float() for level in masks], valid)
        titles = [f"{level_name(stride)} · stride {stride}" for stride in detector.strides]
        used = outlined if kind in BY_LEVEL else [None] * len(own)
        rows.append(Row(kind, [Panel(*panel) for panel in zip(titles, own, detector.strides, used, strict=True)]))
    return rows
