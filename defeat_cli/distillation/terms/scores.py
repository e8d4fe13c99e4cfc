"""Where a teacher is sure of an object: the weights of FRS, and the mask kind `teacher`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from defeat_cli.detectors.contract import CellClassifier, Detector
from defeat_cli.distillation.terms.base import View


def scores_obstacle(teacher: Detector) -> str | None:
    """Why a teacher has no scores to give; None where it has."""
    if not isinstance(teacher, CellClassifier):
        return "the teacher does not score the cells of its features, so it cannot say where it is sure of an object"
    return None


def teacher_scores(student: View, teacher: View, pairs: Sequence[tuple[int, int]]) -> list[Tensor | None]:
    """The teacher's best score of each cell, on the student's cells (arXiv 2111.00674).

        m = largest over classes and anchors of sigmoid(logits)

    The scores of a two-stage teacher are the objectness of its proposals.

    Args:
        pairs: (student, teacher) indices of levels.

    Returns:
        [N, h, w] in [0, 1] for each of the student's levels; None for a level that is in no pair.
    """
    scores: list[Tensor | None] = [None] * len(student.features)
    for s, t in pairs:
        best = teacher.cell_logits[t].flatten(1, 2).amax(dim=1, keepdim=True).sigmoid()
        strides = teacher.detector.strides[t], student.detector.strides[s]
        shape = tuple(student.features[s].shape[-2:])
        scores[s] = teacher.on_grid_of(student, best, strides[0], shape, strides[1])[:, 0]
    return scores
