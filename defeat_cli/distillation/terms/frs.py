"""FRS: features and class scores, each where the teacher is sure of an object (arXiv 2111.00674)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from defeat_cli.config.terms import FrsSettings
from defeat_cli.detectors.contract import CellClassifier, Detector
from defeat_cli.distillation.adapters import Adapter
from defeat_cli.distillation.losses import frs_class_loss, frs_loss
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.distillation.terms.base import Loss, View
from defeat_cli.distillation.terms.pyramid import PyramidTerm, at_published_size, summed
from defeat_cli.distillation.terms.regions import OWN_ANCHORS
from defeat_cli.distillation.terms.scores import scores_obstacle, teacher_scores


class Frs(PyramidTerm):
    """The sum over levels of a squared error and, where both detectors score the same anchors, of a cross-entropy.

    A `class_weight` of 0 leaves the cross-entropy out.

    Both are means over cells, weighted by the teacher's score. The squared error is a sum over channels, given as it
    would be at the published size. Two-stage detectors score by the objectness of their proposals.
    """

    Settings = FrsSettings
    adapter = staticmethod(Adapter)

    def __init__(
        self, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(student, teacher, class_map=class_map, **settings)
        reason, pairs = "the student scores no cells", []
        if isinstance(student, CellClassifier):
            reason = student.cell_obstacle(teacher)
        if reason is None and not student.softmax:
            pairs = match_classes(student.classes, teacher.classes, class_map)
            reason = None if pairs else "teacher and student share no class; distillation.class_map can name pairs"
        of_student, of_teacher = (torch.tensor(side) for side in zip(*pairs, strict=True)) if pairs else (None, None)
        self.register_buffer("student_columns", of_student, persistent=False)
        self.register_buffer("teacher_columns", of_teacher, persistent=False)
        self.compares_scores = reason is None and self.settings.class_weight > 0
        if self.compares_scores:
            self.own_size_obstacle = f"{OWN_ANCHORS}; use teacher.size: student, or class_weight: 0"
        elif self.settings.class_weight > 0:
            self.notes.append(f"frs compares features only, not class scores: {reason}")

    @classmethod
    def obstacle(
        cls, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> str | None:
        return scores_obstacle(teacher) or super().obstacle(student, teacher, class_map=class_map, **settings)

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        scores = teacher_scores(student, teacher, self.pairs)
        partners = dict(self.pairs)
        features: dict[str, Tensor] = {}
        classes: dict[str, Tensor] = {}
        for level in self.compared(student, teacher):
            score = scores[level.index] * level.valid
            features[level.name] = at_published_size(
                frs_loss(level.student, level.teacher, score), channels=level.student.shape[1]
            )
            if self.compares_scores:
                logits = self._logits(student, teacher, level.index, partners[level.index])
                classes[level.name] = frs_class_loss(*logits, score)
        losses = {"features": summed(features, self.settings.weight)}
        if classes:
            losses["classes"] = summed(classes, self.settings.class_weight)
        return losses

    def _logits(self, student: View, teacher: View, s: int, t: int) -> tuple[Tensor, Tensor]:
        """Both detectors' logits of one level in the classes that both know, [N, A, h, w]."""
        ours, theirs = student.cell_logits[s], teacher.cell_logits[t]
        if self.student_columns is not None:
            ours, theirs = ours.index_select(2, self.student_columns), theirs.index_select(2, self.teacher_columns)
        return ours.flatten(1, 2), theirs.flatten(1, 2)
