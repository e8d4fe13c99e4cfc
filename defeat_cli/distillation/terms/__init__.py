"""Terms: the ways in which a teacher supervises a student, one class each."""

from __future__ import annotations

from defeat_cli.distillation.terms.base import Loss, Term, View
from defeat_cli.distillation.terms.crosskd import CrossKd
from defeat_cli.distillation.terms.cwd import Cwd
from defeat_cli.distillation.terms.dist import Dist
from defeat_cli.distillation.terms.fgd import Fgd
from defeat_cli.distillation.terms.fitnets import Fitnets
from defeat_cli.distillation.terms.frs import Frs
from defeat_cli.distillation.terms.imitation import Backbone, Neck
from defeat_cli.distillation.terms.ld import Ld
from defeat_cli.distillation.terms.mgd import Mgd
from defeat_cli.distillation.terms.pkd import Pkd
from defeat_cli.distillation.terms.regions import Head

TERMS: dict[str, type[Term]] = {
    "neck": Neck,
    "head": Head,
    "backbone": Backbone,
    "pkd": Pkd,
    "cwd": Cwd,
    "fgd": Fgd,
    "mgd": Mgd,
    "frs": Frs,
    "fitnets": Fitnets,
    "dist": Dist,
    "crosskd": CrossKd,
    "ld": Ld,
}
"""Every term by the name of its section in a recipe, in the order in which a step computes them."""

__all__ = ["TERMS", "Loss", "Term", "View"]
