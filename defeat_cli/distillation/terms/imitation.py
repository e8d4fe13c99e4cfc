"""Decoupled feature imitation: the neck (DeFeat, section 3) and, as an option, the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from defeat_cli.config.terms import BackboneSettings, NeckSettings
from defeat_cli.detectors.contract import Anchored, Detector
from defeat_cli.distillation.adapters import Adapter
from defeat_cli.distillation.losses import imitation_loss
from defeat_cli.distillation.masks import MASKS, backbone_masks
from defeat_cli.distillation.terms.base import Loss, View
from defeat_cli.distillation.terms.levels import LevelTerm
from defeat_cli.distillation.terms.scores import scores_obstacle, teacher_scores

BACKBONE_STRIDES = (8, 16, 32)
"""Stages 2-4 of the published code, by what they mean in any backbone."""


class _Imitation(LevelTerm):
    """The mean over levels of the decoupled squared error, foreground and background apart."""

    def masks(self, student: View, teacher: View) -> list[Tensor]:
        """[N, h, w] for each of the student's levels that has a partner: how much each cell is foreground."""
        raise NotImplementedError

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        masks = self.masks(student, teacher)
        names, losses = [], []
        for level in self.compared(student, teacher):
            names.append(level.name)
            losses.append(imitation_loss(level.student, level.teacher, masks[level.index], 1.0, 1.0, valid=level.valid))
        weights = (self.settings.alpha_fg, self.settings.alpha_bg)
        return {
            group: Loss(
                torch.stack(values).mean(),
                weight,
                {name: value.detach() for name, value in zip(names, values, strict=True)},
            )
            for group, values, weight in zip(("fg", "bg"), zip(*losses, strict=True), weights, strict=True)
        }


class Neck(_Imitation):
    """Imitation of the FPN features through a 3x3 convolution a level."""

    Settings = NeckSettings
    adapter = staticmethod(Adapter)

    @classmethod
    def obstacle(
        cls, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> str | None:
        if settings.get("mask") == "fine-grained" and not isinstance(student, Anchored):
            return (
                "fine-grained masks compare anchors with boxes, and the student's detector has no anchors; use mask: "
                "boxes or gaussian"
            )
        if settings.get("mask") == "teacher" and (reason := scores_obstacle(teacher)):
            return f"mask: teacher: {reason}"
        return super().obstacle(student, teacher, class_map=class_map, **settings)

    def masks(self, student: View, teacher: View) -> list[Tensor]:
        settings = self.settings
        if settings.mask == "teacher":
            return teacher_scores(student, teacher, self.pairs)
        return MASKS[settings.mask](
            [target["boxes"] for target in student.targets],
            [tuple(feature.shape[-2:]) for feature in student.features],
            [level.stride for level in self.levels],
            finest_scale=settings.finest_scale,
            anchors=student.detector.anchors(student.features, student.batch)
            if settings.mask == "fine-grained"
            else None,
        )


class Backbone(_Imitation):
    """Imitation of backbone stages 2-4 through a 3x3 convolution and a ReLU; every box counts on every stage."""

    Settings = BackboneSettings
    place = "backbone"
    strides = BACKBONE_STRIDES

    def adapter(self, student_channels: int, teacher_channels: int) -> Adapter:
        return Adapter(student_channels, teacher_channels, relu=True)

    def masks(self, student: View, teacher: View) -> list[Tensor]:
        boxes = [target["boxes"] for target in student.targets]
        shapes = [tuple(stage.shape[-2:]) for stage in student.stages]
        return backbone_masks(boxes, shapes, [level.stride for level in self.levels])
