"""CrossKD: the teacher's last layers judge the student's features (arXiv 2306.11369), for one-stage detectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from defeat_cli.config.terms import CrossKdSettings
from defeat_cli.detectors.contract import DenseHead, Detector, at_least_float32, level_names
from defeat_cli.distillation.adapters import adapted
from defeat_cli.distillation.losses import crosskd_box, crosskd_class, moments
from defeat_cli.distillation.masks import valid_masks
from defeat_cli.distillation.pairing import match_levels
from defeat_cli.distillation.terms.base import Loss, Term, View
from defeat_cli.distillation.terms.pyramid import summed


class CrossKd(Term):
    """What the teacher's head says of the student's features is drawn to what it says of its own.

    The student's maps before the last layer of its class and box towers take the teacher's mean and deviation in each
    channel, then pass the teacher's last layer and predictor. Both judgements are the teacher's, of its own anchors and
    classes: the student may be of another one-stage family, with other anchors and classes. Where the towers' widths
    differ, a 1x1 convolution a tower goes between.

    Attributes:
        pairs: (student, teacher) indices of the levels that are compared.
        adapters: one module a tower, classes first.
    """

    Settings = CrossKdSettings

    def __init__(
        self, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(student, teacher, class_map=class_map, **settings)
        self.pairs = match_levels(student.strides, teacher.strides)
        self.names = level_names("P", student.strides)
        widths = zip(student.tower_channels, teacher.tower_channels, strict=True)
        self.adapters = nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, kernel_size=1) for s, t in widths)

    @classmethod
    def obstacle(
        cls, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> str | None:
        for role, detector in (("student", student), ("teacher", teacher)):
            if not isinstance(detector, DenseHead):
                return (
                    f"the {role} has no class and box towers that run over its features; crosskd is for pairs of "
                    "one-stage detectors (retinanet, fcos)"
                )
        if not match_levels(student.strides, teacher.strides):
            return (
                f"no level of the teacher (strides {teacher.strides}) has the stride of one of the student's "
                f"({student.strides})"
            )
        return None

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        head, batch, settings = teacher.detector, teacher.batch, self.settings
        with torch.no_grad():
            own_maps = head.towers(teacher.features)
            own = head.predict(own_maps, batch)
        strides = [teacher.detector.strides[t] for _, t in self.pairs]
        shapes = [tuple(own_maps[t][0].shape[-2:]) for _, t in self.pairs]
        valid = valid_masks(batch.valid, shapes, strides)
        # Levels without a partner keep the teacher's own maps: its head takes all levels, and they are not compared.
        crossed = list(own_maps)
        of_student = student.detector.towers([student.features[s] for s, _ in self.pairs])
        for (s, t), maps, shape, cells in zip(self.pairs, of_student, shapes, valid, strict=True):
            moved = (
                student.on_grid_of(
                    teacher, at_least_float32(m), student.detector.strides[s], shape, teacher.detector.strides[t]
                )
                for m in maps
            )
            crossed[t] = tuple(
                self._recast(adapter, ours, at_least_float32(theirs), cells)
                for adapter, ours, theirs in zip(self.adapters, moved, own_maps[t], strict=True)
            )
        cross = head.predict(crossed, batch)

        positives = sum((labels > 0).sum() for labels in student.regions.labels)
        classes: dict[str, Tensor] = {}
        boxes: dict[str, Tensor] = {}
        for (s, t), cells in zip(self.pairs, valid, strict=True):
            (ours, our_boxes), (theirs, their_boxes) = (
                [output.flatten(0, 1) for output in of_level] for of_level in (cross[t], own[t])
            )
            inside = cells.flatten().repeat_interleave(len(ours) // cells.numel()).to(ours.dtype)
            sure = theirs.amax(dim=1).sigmoid() * inside
            classes[self.names[s]] = crosskd_class(ours, theirs, inside, positives, settings.beta)
            boxes[self.names[s]] = crosskd_box(our_boxes, their_boxes, sure, positives)
        return {"classes": summed(classes, settings.class_weight), "boxes": summed(boxes, settings.box_weight)}

    def _recast(self, adapter: nn.Module, ours: Tensor, theirs: Tensor, cells: Tensor) -> Tensor:
        """A student's map with the teacher's mean and deviation in each channel: [N, C, h, w]."""
        ours = adapted(adapter, ours)
        (mean, std), (their_mean, their_std) = moments(ours, cells), moments(theirs, cells)
        return (ours - mean) / (std + 1e-6) * their_std + their_mean
