"""MGD: the teacher's features are generated from a student of which random cells are hidden (arXiv 2205.01529)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from defeat_cli.config.terms import MgdSettings
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.adapters import adapted
from defeat_cli.distillation.losses import mgd_loss
from defeat_cli.distillation.terms.base import Loss, View
from defeat_cli.distillation.terms.pyramid import PyramidTerm, at_published_size, summed


class Generator(nn.Sequential):
    """Two 3x3 convolutions with a ReLU between them: [N, C, h, w] -> [N, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )


class Mgd(PyramidTerm):
    """The sum over levels of the squared error of generated features.

    Each cell is hidden with chance `hidden`, in all channels at once, anew in every step. The loss is a sum over cells
    and channels, given as it would be at the published size.
    """

    Settings = MgdSettings
    left_out = "pooled"

    def __init__(
        self, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(student, teacher, class_map=class_map, **settings)
        self.generators = nn.ModuleList(Generator(self.teacher_levels[t].channels) for _, t in self.pairs)

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        values = {}
        for level, generator in zip(self.compared(student, teacher), self.generators, strict=True):
            shown = torch.rand_like(level.student[:, :1]) >= self.settings.hidden
            generated = adapted(generator, level.student * shown)
            values[level.name] = at_published_size(
                mgd_loss(generated, level.teacher, level.valid),
                channels=generated.shape[1],
                stride=self.levels[level.index].stride,
                valid=level.valid,
            )
        return {"": summed(values, self.settings.weight)}
