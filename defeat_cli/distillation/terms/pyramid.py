"""What the rivals at the neck have in common: adapters only where channels differ, sums over levels, published weights.

A published weight belongs to maps of an 800 x 1333 image with 256 channels wherever the loss is a sum over cells or
channels. `at_published_size` turns such a sum into what it would be there, so a setting means the same at every size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from defeat_cli.detectors.contract import Detector, RegionClassifier
from defeat_cli.distillation.terms.base import Loss
from defeat_cli.distillation.terms.levels import LevelTerm

PUBLISHED_IMAGE = (800, 1333)
"""Height and width in pixels of the image that published weights belong to."""

PUBLISHED_CHANNELS = 256
"""Channels of the neck that published weights belong to."""


def at_published_size(
    total: Tensor, *, channels: int | None = None, stride: int | None = None, valid: Tensor | None = None
) -> Tensor:
    """A sum over channels, over cells or over both, as it would be on the published image with the published channels.

    It is multiplied by 256 / C, and by the cells that a level has on an 800 x 1333 image over the valid cells that it
    has on the batch's average image. So the same image at half the side, whose levels have a quarter of the cells,
    gives the same loss, and weights the same gradient, for equal errors a cell.

    Args:
        total: the sum, over N where it is a sum over a batch's cells.
        channels: C, where it is a sum over channels.
        stride, valid: input pixels a cell and [N, h, w] bool, where it is a sum over cells.
    """
    if channels is not None:
        total = total * PUBLISHED_CHANNELS / channels
    if stride is not None:
        there = math.prod(math.ceil(side / stride) for side in PUBLISHED_IMAGE)
        total = total * there * len(valid) / valid.sum().clamp(min=1)
    return total


def two_stage(detector: Detector) -> bool:
    """Whether a detector classifies proposals, as Faster R-CNN does. Published weights are given for either kind."""
    return isinstance(detector, RegionClassifier) and detector.softmax


class PyramidTerm(LevelTerm):
    """A term over the neck's levels whose losses are summed, as its authors do.

    Student features go through a 1x1 convolution where the teacher has other channels, and are taken as they are where
    it has not.
    """

    left_out: ClassVar[Literal["last", "pooled"] | None] = None
    """The level that its authors leave out: the student's coarsest, or only one that merely samples the level before it
    (Faster R-CNN's P6)."""

    def __init__(
        self, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(student, teacher, class_map=class_map, **settings)
        self.settings = self.settings.for_student(two_stage(student))

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        if student_channels == teacher_channels:
            return nn.Identity()
        return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)

    @classmethod
    def match(cls, student: Detector, teacher: Detector) -> list[tuple[int, int]]:
        """All shared levels but the one that is left out; a single one is kept."""
        pairs = cls.shared(student, teacher)
        if cls.left_out == "last" or (cls.left_out == "pooled" and two_stage(student)):
            last = len(student.levels) - 1
            return [pair for pair in pairs if pair[0] != last] or pairs
        return pairs


def summed(values: Mapping[str, Tensor], weight: float) -> Loss:
    """The sum over levels, with the value of each."""
    return Loss(
        torch.stack(list(values.values())).sum(), weight, {name: value.detach() for name, value in values.items()}
    )
