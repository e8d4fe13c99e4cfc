"""How many seeds a difference of a given size needs to be seen: the power of the paired t-test."""

from __future__ import annotations

import math

from defeat_cli.ablation.statistics import t_quantile

POWER = 0.8
"""Chance that a study of so many seeds has an interval that leaves out 0, where the difference is really there."""

MOST = 1000
"""More seeds than anybody trains."""

_PANELS = 400


def seeds_needed(difference: float, deviation: float, power: float = POWER) -> int | None:
    """Fewest pairs with which the paired t-test (two-sided, 5%) finds a difference with the given chance.

    Args:
        difference: mean of the paired differences; deviation: their standard deviation, in the same unit.
        power: wanted chance, between 0.05 and 1.

    Returns:
        At least 2; None where even `MOST` pairs do not do.
    """
    if deviation == 0:
        return 2 if difference else None
    effect = abs(difference) / deviation
    if chance(effect, MOST) < power:
        return None
    low, high = 1, MOST  # power grows with the number of pairs
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(effect, middle) >= power else (middle, high)
    return high


def chance(effect: float, pairs: int) -> float:
    """Power of the two-sided paired t-test at 5%.

    T = (Z + λ) / sqrt(V / f) with λ = effect · sqrt(pairs), f = pairs - 1 and V chi-squared. Given V = f·w² the chance
    of |T| > t is Φ(λ - t·w) + Φ(-λ - t·w), which is integrated over the density of w by Simpson's rule.

    Args:
        effect: difference over standard deviation of the paired differences.
        pairs: at least 2.
    """
    freedom = pairs - 1
    shift, t = effect * math.sqrt(pairs), t_quantile(freedom)
    # w² is a mean of f squares: 12 of its deviations around 1 hold all that counts.
    reach = 12 / math.sqrt(2 * freedom)
    low, high = max(0.0, 1 - reach), 1 + reach
    step = (high - low) / _PANELS
    total = 0.0
    for i in range(_PANELS + 1):
        w = low + i * step
        weight = 1 if i in (0, _PANELS) else 4 if i % 2 else 2
        total += weight * _density(w, freedom) * (_below(shift - t * w) + _below(-shift - t * w))
    return total * step / 3


def _density(w: float, freedom: int) -> float:
    """Density of sqrt(V / f), V chi-squared with f degrees."""
    if w == 0:
        return math.sqrt(2 / math.pi) if freedom == 1 else 0.0
    half = freedom / 2
    return 2 * math.exp(half * math.log(half) - math.lgamma(half) + (freedom - 1) * math.log(w) - half * w * w)


def _below(z: float) -> float:
    """Standard normal distribution."""
    return math.erfc(-z / math.sqrt(2)) / 2
