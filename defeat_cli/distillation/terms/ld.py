"""LD (localization distillation), which is known by name only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defeat_cli.config.terms import TermSettings
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.terms.base import Loss, Term, View


class Ld(Term):
    """Not to be had: every pair is refused, with the reason (arXiv 2102.12252)."""

    Settings = TermSettings

    @classmethod
    def obstacle(
        cls, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> str | None:
        return (
            "ld distils the distribution that a detector predicts for each side of a box (as GFL does), and "
            "torchvision's detectors predict one number a side; crosskd, or a term at the neck, reaches the boxes too"
        )

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        raise NotImplementedError
