"""Terms on images without annotations: what stands for their boxes, and how their losses join the labelled ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from defeat_cli.detectors.contract import Detector, Target
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.distillation.terms import Loss, View


class PseudoLabels(nn.Module):
    """What the teacher detects with confidence on images without annotations, as targets for the student.

    Args:
        threshold: score from which on a detection counts.
        class_map: teacher class to student class, where names differ; detections of other classes do not count.

    Attributes:
        pairs: (student, teacher) indices of the classes that are shared.

    Raises:
        DefeatError: `class_map` names no class of theirs.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        threshold: float = 0.5,
        class_map: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.pairs = match_classes(student.classes, teacher.classes, class_map)
        labels = torch.zeros(len(teacher.classes) + 1, dtype=torch.int64)
        for s, t in self.pairs:
            labels[t + 1] = s + 1
        self.register_buffer("student_labels", labels, persistent=False)

    @torch.no_grad()
    def forward(self, teacher: View) -> list[Target]:
        """`boxes` [M, 4] in the pixels of the teacher's batch and `labels` [M] of the student, one pair an image."""
        targets = []
        for found in teacher.detector.detections(teacher.features, teacher.batch):
            labels = self.student_labels[found["labels"]]
            counts = (found["scores"] >= self.threshold) & (labels > 0)
            targets.append({"boxes": found["boxes"][counts], "labels": labels[counts]})
        return targets


def apart(images: list[Tensor], targets: list[Target | None]) -> tuple[list[Tensor], list[Target], list[Tensor]]:
    """The labelled images of a batch, their targets, and the images whose target is None."""
    pairs = list(zip(images, targets, strict=True))
    labelled = [(image, target) for image, target in pairs if target is not None]
    return [i for i, _ in labelled], [t for _, t in labelled], [image for image, target in pairs if target is None]


def averaged(labelled: Mapping[str, Loss], unlabelled: Mapping[str, Loss], share: float) -> dict[str, Loss]:
    """A term's losses on labelled and on unlabelled images as one: `(1 - share) * labelled + share * unlabelled`.

    Args:
        share: unlabelled images as a share of all; so a weight means what it does without them, and an image counts
            as much as another. Where the teacher finds no object, a loss over objects is 0 on unlabelled images.
    """

    def mean(ours: Tensor, theirs: Tensor) -> Tensor:
        return (1 - share) * ours + share * theirs

    return {
        name: Loss(
            mean(loss.value, unlabelled[name].value),
            loss.weight,
            {part: mean(value, unlabelled[name].parts[part]) for part, value in loss.parts.items()},
        )
        for name, loss in labelled.items()
    }
