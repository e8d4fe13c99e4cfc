"""Whether an exported file detects what the detector detects, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 0.5
"""Pixels of the image, each side of a box."""

Detections = Mapping[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Detections of one image by the detector and by the file.

    counts: how many each has.
    score, box: largest difference among those that belong together; 0 where there are none.
    unmatched: detections of either that the other does not have.
    borderline: those of them that are that only because of a score as low as what the detector cuts off.
    """

    counts: tuple[int, int]
    score: float
    box: float
    unmatched: int
    borderline: int

    @property
    def agrees(self) -> bool:
        return self.unmatched == self.borderline


def compare(ours: Detections, theirs: Detections, score_threshold: float, most: int) -> Comparison:
    """Match detections one to one: the same label, scores and boxes within the tolerances, the nearest box first.

    Their order says nothing, for equal scores may come in any.

    Args:
        ours, theirs: `boxes` [M, 4] xyxy pixels, `scores` [M], `labels` [M].
        score_threshold: the detector gives none below it.
        most: the detector gives no more than so many. A detection whose score is within the tolerance of the last one
            that is kept may be in one of the two alone.
    """
    distance = (ours["boxes"][:, None] - theirs["boxes"][None]).abs().amax(dim=2)
    score = (ours["scores"][:, None] - theirs["scores"][None]).abs()
    fits = (distance <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE) & (ours["labels"][:, None] == theirs["labels"])
    free_rows, free_columns = torch.ones(len(ours["scores"])).bool(), torch.ones(len(theirs["scores"])).bool()
    box_difference = score_difference = 0.0
    rows, columns = fits.nonzero(as_tuple=True)
    for pair in distance[rows, columns].argsort().tolist():
        row, column = int(rows[pair]), int(columns[pair])
        if free_rows[row] and free_columns[column]:
            free_rows[row] = free_columns[column] = False
            box_difference = max(box_difference, float(distance[row, column]))
            score_difference = max(score_difference, float(score[row, column]))
    left = torch.cat([ours["scores"][free_rows], theirs["scores"][free_columns]])
    cuts = [score_threshold, *(float(d["scores"].min()) for d in (ours, theirs) if len(d["scores"]) >= most > 0)]
    borderline = int((left <= max(cuts) + SCORE_TOLERANCE).sum())
    counts = (len(free_rows), len(free_columns))
    return Comparison(counts, score_difference, box_difference, len(left), borderline)
