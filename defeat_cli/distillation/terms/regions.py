"""Distillation of the head: teacher and student classify the same regions, the teacher's (DeFeat, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from defeat_cli.config.terms import HeadSettings
from defeat_cli.detectors.contract import Detector, RegionClassifier
from defeat_cli.distillation.losses import region_kl, region_kl_sigmoid
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.distillation.terms.base import Loss, Term, View
from defeat_cli.text import counted, listed

OWN_ANCHORS = (
    "a head scores the anchors or points of the images that it sees, and those of other sizes are not the same"
)
"""Why heads whose regions are all anchors have to see images of one size."""


class RegionTerm(Term):
    """A term over the classification of the teacher's regions by both heads, in the classes that both know."""

    def __init__(
        self, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(student, teacher, class_map=class_map, **settings)
        self.softmax = student.softmax
        if not self.softmax:
            self.own_size_obstacle = f"{OWN_ANCHORS}; use teacher.size: student"
        pairs = match_classes(student.classes, teacher.classes, class_map)
        if len(pairs) < max(len(student.classes), len(teacher.classes)):
            shared = listed([student.classes[s] for s, _ in pairs])
            self.notes.append(f"head distillation runs over {counted(len(pairs), 'shared class')} ({shared})")
        # The background column comes first in softmax logits and is shared by every pair of detectors.
        columns = [(0, 0)] + [(s + 1, t + 1) for s, t in pairs] if self.softmax else pairs
        if pairs != [(i, i) for i in range(max(len(student.classes), len(teacher.classes)))]:
            self.register_buffer("student_columns", torch.tensor([s for s, _ in columns]), persistent=False)
            self.register_buffer("teacher_columns", torch.tensor([t for _, t in columns]), persistent=False)
        else:
            self.student_columns = self.teacher_columns = None

    @classmethod
    def obstacle(
        cls, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> str | None:
        for role, detector in (("student", student), ("teacher", teacher)):
            if not isinstance(detector, RegionClassifier):
                return f"the {role} does not classify regions"
        reason = student.region_obstacle(teacher)
        if reason is None and not match_classes(student.classes, teacher.classes, class_map):
            reason = "teacher and student share no class; distillation.class_map can name pairs"
        return reason

    def logits(self, student: View, teacher: View) -> tuple[Tensor, Tensor, Tensor]:
        """Both logits [R, K] of the teacher's regions in the shared classes, and the regions' labels [R]."""
        theirs = teacher.classify(teacher.regions)
        ours = student.classify(teacher.regions_in(student))
        if self.student_columns is not None:
            ours = ours.index_select(1, self.student_columns)
            theirs = theirs.index_select(1, self.teacher_columns)
        return ours, theirs, torch.cat(teacher.regions.labels)


class Head(RegionTerm):
    """Foreground and background regions are averaged apart, or all together.

    The published code takes logits of the teacher's regions but labels of the student's; its author calls that a
    mistake. Here the labels are those of the regions that are classified.
    """

    Settings = HeadSettings
    dispensable = True

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        settings = self.settings
        ours, theirs, labels = self.logits(student, teacher)
        divergence = region_kl if self.softmax else region_kl_sigmoid
        temperatures = {"temperature_fg": settings.temperature_fg, "temperature_bg": settings.temperature_bg}
        fg, bg = divergence(ours, theirs, labels > 0, valid=labels >= 0, **temperatures)
        if settings.decoupled:
            return {"fg": Loss(fg, settings.beta_fg), "bg": Loss(bg, settings.beta_bg)}
        every = torch.ones_like(labels, dtype=torch.bool)
        together, _ = divergence(ours, theirs, every, valid=labels >= 0, **temperatures)
        return {"fg": Loss(fg, 0.0), "bg": Loss(bg, 0.0), "all": Loss(together, settings.beta_fg)}
