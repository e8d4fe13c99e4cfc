"""Means over seeds, and whether two variants differ by more than their seeds do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

MIN_PAIRS = 3
"""Seeds that an interval needs. With two it reaches 9 standard deviations either way, which says nothing."""


@dataclass(frozen=True)
class Delta:
    """A mean difference; with enough pairs their standard deviation and the mean's 95% confidence interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    deviation: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Measured:
    """One measure of a variant: values by seed, mean, sample deviation (None for one), paired difference to another."""

    values: dict[int, float]
    mean: float
    deviation: float | None
    delta: Delta | None = None


def measured(values: dict[int, float], baseline: Mapping[int, float] | None = None) -> Measured:
    """Values by seed, and where `baseline` is given their difference to it."""
    spread = stdev(values.values()) if len(values) > 1 else None
    return Measured(values, fmean(values.values()), spread, paired_delta(values, baseline or {}))


def paired_delta(values: Mapping[int, float], baseline: Mapping[int, float]) -> Delta | None:
    """Mean of value - baseline over the seeds that both have; None where they share no seed.

    The interval is Student's for paired samples, mean ± t * s / sqrt(n) with s the deviation of the n differences: runs
    of one seed share their first weights and data order, so that what a seed does to both cancels. It assumes
    differences that are about normal, and is not corrected for the number of variants compared.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        return None
    middle = fmean(differences)
    if len(differences) < MIN_PAIRS:
        return Delta(middle)
    spread = stdev(differences)
    half = t_quantile(len(differences) - 1) * spread / math.sqrt(len(differences))
    return Delta(middle, middle - half, middle + half, spread)


def t_quantile(freedom: int, coverage: float = 0.95) -> float:
    """The t with P(|T| <= t) = `coverage` for Student's T with `freedom` degrees, by bisection."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < coverage else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= t) with t = sqrt(freedom) * tan(angle): a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
