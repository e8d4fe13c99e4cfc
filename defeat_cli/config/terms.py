"""Settings of the distillation terms, one class a term; the terms themselves are in `distillation/terms/`.

They stand here and not beside the terms so that a recipe can be checked without torch. A term that is not in `SETTINGS`
may bring its own as `Term.Settings`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from defeat_cli.config.architecture import STRICT
from defeat_cli.config.types import Flag, Fraction, NonNegative, Positive, Whole

MEASUREMENTS = 20
"""How often a term's pull is measured before a balance fixes its weight."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TermSettings:
    """When a term is on, and how strongly: what all terms have."""

    start: Whole = 0
    """Step that the term begins at."""
    warmup_steps: Whole | None = None
    """Steps over which it grows linearly from 0 to its weight; null takes `distillation.warmup_steps`."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How it shrinks to 0 from its start to its stop."""
    stop: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    """Share of the training after which it is off."""

    def strength(self, step: int, steps: int, warmup_steps: int = 0) -> float | None:
        """Factor in [0, 1] on the term at a step of `steps`, counted from 0; None where the term is off.

        Args:
            warmup_steps: where the term has none of its own.
        """
        last = self.stop * steps
        if not self.start <= step < last:
            return None
        warmup = self._warmup(warmup_steps)
        warm = min(1.0, (step - self.start) / warmup) if warmup else 1.0
        done = (step - self.start) / (last - self.start)
        shrunk = {"none": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.decay]
        return warm * shrunk

    def measured_at(self, step: int, warmup_steps: int = 0) -> bool:
        """Whether a balance measures the term at a step: `MEASUREMENTS` times, spread over its warm-up."""
        window = max(MEASUREMENTS, self._warmup(warmup_steps))
        since = step - self.start
        return 0 <= since < window and since % (window // MEASUREMENTS) == 0

    def _warmup(self, warmup_steps: int) -> int:
        return warmup_steps if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NeckSettings(TermSettings):
    """Decoupled imitation of the teacher's FPN features (DeFeat, section 3)."""

    mask: Literal["boxes", "gaussian", "fine-grained", "full", "teacher"] = "boxes"
    """What counts as foreground."""
    finest_scale: Positive = 56.0
    """Object side, in pixels, that the first level begins at."""
    alpha_fg: NonNegative = 4.0
    """Weight of foreground cells."""
    alpha_bg: NonNegative = 16.0
    """Weight of background cells."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HeadSettings(TermSettings):
    """Decoupled classification of the teacher's regions (DeFeat, section 3)."""

    decoupled: Flag = True
    """Foreground and background regions are averaged apart; false takes one average over all, with `beta_fg`."""
    beta_fg: NonNegative = 2.0
    """Weight of foreground regions."""
    beta_bg: NonNegative = 2.0
    """Weight of background regions."""
    temperature_fg: Positive = 1.0
    temperature_bg: Positive = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BackboneSettings(TermSettings):
    """Decoupled imitation of backbone stages 2-4."""

    alpha_fg: NonNegative = 4.0
    """Weight of foreground cells."""
    alpha_bg: NonNegative = 16.0
    """Weight of background cells."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PublishedSettings(TermSettings):
    """Settings that have one published value for two-stage students and another for one-stage ones.

    Weights are those of an 800 x 1333 image and a neck of 256 channels, and mean the same on any other: a loss that is
    a sum over cells or channels is converted (`distillation/terms/pyramid.py`).
    """

    PUBLISHED: ClassVar[dict[str, tuple[float, float]]] = {}
    """Key -> (two-stage, one-stage), which null stands for."""

    def for_student(self, two_stage: bool) -> PublishedSettings:
        """These settings with the published value wherever one is null."""
        missing = {key: pair for key, pair in self.PUBLISHED.items() if getattr(self, key) is None}
        return replace(self, **{key: pair[0 if two_stage else 1] for key, pair in missing.items()})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PkdSettings(PublishedSettings):
    """Features that correlate with the teacher's at the neck (PKD)."""

    PUBLISHED: ClassVar = {"weight": (6.0, 10.0)}

    weight: NonNegative | None = None
    """null takes the published 6 for two-stage students, 10 for one-stage ones."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CwdSettings(PublishedSettings):
    """Channels that look where the teacher's do, at the neck (CWD)."""

    weight: NonNegative = 10.0
    temperature: Positive = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FgdSettings(PublishedSettings):
    """Focal and global distillation at the neck (FGD). Null takes the published weights."""

    PUBLISHED: ClassVar = {
        "alpha_fg": (5e-5, 1e-3),
        "alpha_bg": (2.5e-5, 5e-4),
        "attention": (5e-5, 5e-4),
        "relation": (5e-7, 5e-6),
    }

    alpha_fg: NonNegative | None = None
    """Weight of foreground cells."""
    alpha_bg: NonNegative | None = None
    """Weight of background cells."""
    attention: NonNegative | None = None
    """Weight of the attention's distance."""
    relation: NonNegative | None = None
    """Weight of the relations' distance; 0 trains no relation modules."""
    temperature: Positive = 0.5
    """Of the attention."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MgdSettings(PublishedSettings):
    """Generation of the teacher's features from a masked student at the neck (MGD)."""

    PUBLISHED: ClassVar = {"weight": (5e-7, 2e-5), "hidden": (0.45, 0.65)}

    weight: NonNegative | None = None
    """null takes the published 5e-7 for two-stage students, 2e-5 for one-stage ones."""
    hidden: Fraction | None = None
    """Share of the cells that are hidden; null takes 0.45 for two-stage students, 0.65 for one-stage ones."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FrsSettings(PublishedSettings):
    """Features and class scores where the teacher is sure of an object (FRS)."""

    PUBLISHED: ClassVar = {"weight": (0.002, 0.005), "class_weight": (0.1, 0.02)}

    weight: NonNegative | None = None
    """Of the features; null takes the published 0.002 for two-stage students, 0.005 for one-stage ones."""
    class_weight: NonNegative | None = None
    """Of the class scores; null takes the published 0.1 for two-stage students, 0.02 for one-stage ones."""
    warmup_steps: Whole | None = 500


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FitnetsSettings(TermSettings):
    """Imitation of every cell of the neck alike."""

    weight: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistSettings(TermSettings):
    """Class probabilities of the teacher's regions that correlate with the teacher's (DIST)."""

    beta: NonNegative = 1.0
    """Weight of the correlation over the classes of each region."""
    gamma: NonNegative = 1.0
    """Weight of the correlation over the regions of each class."""
    temperature: Positive = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CrossKdSettings(TermSettings):
    """What the teacher's head says of the student's features (CrossKD), for one-stage detectors."""

    class_weight: NonNegative = 1.0
    box_weight: NonNegative = 1.0
    beta: Annotated[float, Field(ge=1, strict=True, allow_inf_nan=False)] = 1.0
    """Power of the distance between scores that weighs each."""


SETTINGS: dict[str, type[TermSettings]] = {
    "neck": NeckSettings,
    "head": HeadSettings,
    "backbone": BackboneSettings,
    "pkd": PkdSettings,
    "cwd": CwdSettings,
    "fgd": FgdSettings,
    "mgd": MgdSettings,
    "frs": FrsSettings,
    "fitnets": FitnetsSettings,
    "dist": DistSettings,
    "crosskd": CrossKdSettings,
    "ld": TermSettings,
}
"""Settings of the shipped terms by the terms' names."""

DEFAULT_TERMS = ("neck", "head")
"""Terms that are on where a recipe does not say."""
