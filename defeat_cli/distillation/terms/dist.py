"""DIST: class probabilities that correlate with the teacher's, region by region and class by class (2205.10536)."""

from __future__ import annotations

from defeat_cli.config.terms import DistSettings
from defeat_cli.distillation.losses import dist_loss
from defeat_cli.distillation.terms.base import Loss, View
from defeat_cli.distillation.terms.regions import RegionTerm


class Dist(RegionTerm):
    """Correlation over the teacher's regions: the softmax of proposals, or the sigmoids of all anchors or points."""

    Settings = DistSettings

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        settings = self.settings
        *logits, labels = self.logits(student, teacher)
        scaled = [side.float() / settings.temperature for side in logits]
        ours, theirs = (side.softmax(dim=1) if self.softmax else side.sigmoid() for side in scaled)
        rows, columns = dist_loss(ours, theirs, valid=labels >= 0)
        square = settings.temperature**2
        return {"regions": Loss(square * rows, settings.beta), "classes": Loss(square * columns, settings.gamma)}
