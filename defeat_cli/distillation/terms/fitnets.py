"""FitNets-style imitation: every cell and channel alike, no mask (arXiv 1412.6550, at the neck)."""

from __future__ import annotations

import torch

from defeat_cli.config.terms import FitnetsSettings
from defeat_cli.distillation.adapters import Adapter
from defeat_cli.distillation.losses import imitation_loss
from defeat_cli.distillation.terms.base import Loss, View
from defeat_cli.distillation.terms.levels import LevelTerm


class Fitnets(LevelTerm):
    """The mean over levels, cells and channels of the squared error, through a 3x3 convolution a level."""

    Settings = FitnetsSettings
    adapter = staticmethod(Adapter)

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        values = {}
        for level in self.compared(student, teacher):
            # Twice the weight undoes the half in the imitation of a group that holds every cell.
            everywhere = torch.ones_like(level.valid)
            values[level.name], _ = imitation_loss(level.student, level.teacher, everywhere, 2.0, 0.0, level.valid)
        parts = {name: value.detach() for name, value in values.items()}
        return {"": Loss(torch.stack(list(values.values())).mean(), self.settings.weight, parts)}
