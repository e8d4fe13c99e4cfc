"""CWD: each channel looks where the teacher's does (arXiv 2011.13256)."""

from __future__ import annotations

from defeat_cli.config.terms import CwdSettings
from defeat_cli.distillation.losses import cwd_loss
from defeat_cli.distillation.terms.base import Loss, View
from defeat_cli.distillation.terms.pyramid import PyramidTerm, summed


class Cwd(PyramidTerm):
    """The sum over levels of the divergence between each channel's softmax over cells."""

    Settings = CwdSettings

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        values = {
            level.name: cwd_loss(level.student, level.teacher, self.settings.temperature, level.valid)
            for level in self.compared(student, teacher)
        }
        return {"": summed(values, self.settings.weight)}
