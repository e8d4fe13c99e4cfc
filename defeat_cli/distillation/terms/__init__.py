"""Terms: the ways in which a teacher supervises a student, one class each."""

from __future__ import annotations

from defeat_cli.distillation.terms.base import Loss, Term, View
from defeat_cli.distillation.terms.imitation import Backbone, Neck
from defeat_cli.distillation.terms.regions import Head

TERMS: dict[str, type[Term]] = {"neck": Neck, "head": Head, "backbone": Backbone}
"""Every term by the name of its section in a recipe, in the order in which a step computes them."""

__all__ = ["TERMS", "Loss", "Term", "View"]
