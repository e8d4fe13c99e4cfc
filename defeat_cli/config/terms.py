"""Settings of the distillation terms, one class a term; the terms themselves are in `distillation/terms/`.

They stand here and not beside the terms so that a recipe can be checked without torch. A term that is not in `SETTINGS`
may bring its own as `Term.Settings`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from defeat_cli.config.architecture import STRICT
from defeat_cli.config.types import Flag, NonNegative, Positive, Whole


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
        warmup = warmup_steps if self.warmup_steps is None else self.warmup_steps
        warm = min(1.0, (step - self.start) / warmup) if warmup else 1.0
        done = (step - self.start) / (last - self.start)
        shrunk = {"none": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.decay]
        return warm * shrunk


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NeckSettings(TermSettings):
    """Decoupled imitation of the teacher's FPN features (DeFeat, section 3)."""

    mask: Literal["boxes", "gaussian", "fine-grained", "full"] = "boxes"
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


SETTINGS: dict[str, type[TermSettings]] = {"neck": NeckSettings, "head": HeadSettings, "backbone": BackboneSettings}
"""Settings of the shipped terms by the terms' names."""

DEFAULT_TERMS = ("neck", "head")
"""Terms that are on where a recipe does not say."""
