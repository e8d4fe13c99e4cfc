"""PKD: features that correlate with the teacher's, whatever their scale (arXiv 2207.02039)."""

from __future__ import annotations

from defeat_cli.config.terms import PkdSettings
from defeat_cli.distillation.losses import pkd_loss
from defeat_cli.distillation.terms.base import Loss, View
from defeat_cli.distillation.terms.pyramid import PyramidTerm, summed


class Pkd(PyramidTerm):
    """The sum over all levels but the coarsest of half the mean squared difference of standardised features."""

    Settings = PkdSettings
    left_out = "last"

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        values = {
            level.name: pkd_loss(level.student, level.teacher, level.valid) for level in self.compared(student, teacher)
        }
        return {"": summed(values, self.settings.weight)}
