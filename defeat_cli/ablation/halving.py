"""Successive halving of a wide sweep: all its values train a share of the epochs, the better half goes on, and so on.

Nothing of it is stored: who goes on follows from the AP that each run had at each stop, which its metrics keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from defeat_cli.errors import RunError
from defeat_cli.text import counted


def stops(values: int, epochs: int, budget: float, every: int = 1) -> list[int]:
    """Epochs after which only the better half of the values goes on, and at the end all epochs.

    Each stop is at twice the epochs of the one before. As few halvings as the budget allows, for an early AP says less.

    Args:
        values: how many a sweep has.
        epochs: of a whole training.
        budget: whole trainings that a sweep may cost, counted for each seed.
        every: epochs between evaluations; a stop is at an evaluation.

    Raises:
        RunError: no halving is within the budget.
    """
    costs = []
    for halvings in range(math.ceil(math.log2(values)) + 1):
        plan = [every * round(epochs / 2 ** (halvings - i) / every) for i in range(halvings)] + [epochs]
        if plan[0] < 1 or sorted(set(plan)) != plan:
            break
        steps = [end - begin for begin, end in zip([0, *plan], plan, strict=False)]
        costs.append(sum(math.ceil(values / 2**i) * step for i, step in enumerate(steps)) / epochs)
        if costs[-1] <= budget:
            return plan
    raise RunError(
        f"--budget {budget:g}: a sweep of {counted(values, 'value')} costs at least "
        f"{math.ceil(10 * min(costs)) / 10:g} whole trainings of {counted(epochs, 'epoch')} with each seed; give "
        "that, or fewer values"
    )


@dataclass(frozen=True)
class Standing:
    """aims: the epoch up to which each value is to be trained now; stopped: the values for which that was the last."""

    aims: dict[str, int]
    stopped: set[str]


def standing(
    curves: Mapping[str, Sequence[Mapping[int, float]]], stops: Sequence[int], failed: frozenset[str] = frozenset()
) -> Standing:
    """Who goes on, judged by the mean over seeds of the AP at each stop.

    Args:
        curves: value -> for each seed epoch -> AP, as far as it is trained.
        failed: values of which a run failed. Nobody waits for them at a stop that they have not reached, nor for
            anybody at a stop that some have passed already.
    """
    going = list(curves)
    now = Standing({}, set())
    for stop in stops:
        now.aims.update(dict.fromkeys(going, stop))
        reached = [name for name in going if all(stop in curve for curve in curves[name])]
        begun = any(epoch > stop for seeds in curves.values() for curve in seeds for epoch in curve)
        if stop == stops[-1] or (not begun and any(name not in failed for name in going if name not in reached)):
            break
        ap = {name: fmean(curve[stop] for curve in curves[name]) for name in reached}
        going = sorted(reached, key=lambda name: -ap[name])[: math.ceil(len(going) / 2)]
        now.stopped.update(set(reached) - set(going))
    return now
