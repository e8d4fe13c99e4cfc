"""What a study found: the outcome of each run, and from them a row of measures per variant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defeat_cli.ablation.choice import BASELINE, SweepPoint
from defeat_cli.ablation.statistics import Measured, measured
from defeat_cli.config.schema import nearest
from defeat_cli.config.variants import Variant
from defeat_cli.engine.detection_errors import ERROR_TYPES
from defeat_cli.engine.evaluation import FIGURES
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import RunError

APS = FIGURES[:6]
BACKGROUND, SECONDS = "background_false_positives", "training_seconds"
COSTS = tuple(f"dap_{name}" for name in ERROR_TYPES)
MEASURES = (*APS, *(f"best_{name}" for name in APS), BACKGROUND, *COSTS, SECONDS)
"""Everything that is averaged over seeds. AP and dAP are fractions 0-1, dAP being the AP50 that an error type costs.
All are of the last epoch, but for `best_…`: of the epoch with the best AP, which flatters whatever varies most."""

SORTS = {**{name: (name, -1) for name in APS}, "background": (BACKGROUND, 1), "time": (SECONDS, 1)}
"""What a table can be sorted by, best first: the measure, and 1 where less is better. `given` keeps the order."""


@dataclass(frozen=True)
class Outcome:
    """One run of a study.

    evaluations: the evaluations so far, as metrics.jsonl has them. results: results.json, None until it is finished.
    """

    variant: str
    seed: int
    evaluations: Sequence[dict[str, Any]] = ()
    results: dict[str, Any] | None = None

    @property
    def curve(self) -> dict[int, float]:
        """Epoch -> AP."""
        return {entry["epoch"]: entry["AP"] for entry in self.evaluations}


@dataclass(frozen=True)
class Row:
    """One variant. `measured` lacks what no finished run has, e.g. APs where there are no small objects.

    epoch: up to which all its runs are trained; ap: at that epoch, None where a run has no evaluation yet.
    """

    variant: str
    finished: int
    runs: int
    measured: dict[str, Measured]
    epoch: int = 0
    ap: Measured | None = None


def read_outcome(variant: str, seed: int, folder: Path) -> Outcome:
    """What a run folder holds, finished, unfinished or not begun."""
    run = RunFolder(folder)
    evaluations = tuple(entry for entry in run.metrics() if entry["kind"] == "eval")
    return Outcome(variant, seed, evaluations, run.results() if run.finished else None)


def summarize(outcomes: Iterable[Outcome], sort: str = "AP", against: str = BASELINE) -> list[Row]:
    """One row per variant, sorted; variants without a finished run come last.

    Args:
        against: the variant that differences are to.

    Raises:
        RunError: no such sort key.
    """
    check_sort(sort)
    runs: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        runs.setdefault(outcome.variant, []).append(outcome)
    values = {variant: _by_measure(group) for variant, group in runs.items()}
    baseline = values.get(against, {})
    rows = []
    for variant, group in runs.items():
        other = baseline if variant != against else {}
        found = {name: measured(by_seed, other.get(name)) for name, by_seed in values[variant].items()}
        epoch = max(set.intersection(*(set(run.curve) for run in group)), default=0)
        ap = measured({run.seed: run.curve[epoch] for run in group}) if epoch else None
        rows.append(Row(variant, sum(run.results is not None for run in group), len(group), found, epoch, ap))
    if sort == "given":
        return rows
    measure, sign = SORTS[sort]
    return sorted(rows, key=lambda r: sign * r.measured[measure].mean if measure in r.measured else float("inf"))


def check_sort(sort: str) -> None:
    """Refuse an unknown sort key, naming the nearest."""
    known = (*SORTS, "given")
    if sort not in known:
        raise RunError(f"--sort {sort}: no such key{nearest(sort, known)}. Known: {', '.join(known)}")


def _by_measure(runs: list[Outcome]) -> dict[str, dict[int, float]]:
    """Measure -> seed -> value, over the finished runs of one variant."""
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        if run.results is not None:
            for name, value in _measures(run.evaluations, run.results).items():
                values.setdefault(name, {})[run.seed] = value
    return values


def _measures(evaluations: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, float]:
    """The measures of one finished run; what had nothing to score (-1 there) is left out."""
    last, best = evaluations[-1], max(evaluations, key=lambda entry: entry["AP"])
    values = {name: last[name] for name in APS} | {f"best_{name}": best[name] for name in APS}
    values = {name: value for name, value in values.items() if value >= 0}
    if "errors" in last:
        values[BACKGROUND] = last["errors"]["background_false_positives"]["count"]
        values |= {f"dap_{name}": last["errors"]["types"][name]["dap"] for name in ERROR_TYPES}
    return values | {SECONDS: results["training_seconds"]}


def check_against(against: str, variants: Iterable[str]) -> None:
    """Refuse to compare with a variant that is none of the study's, naming the nearest."""
    known = list(variants)
    if against not in known:
        raise RunError(
            f"--against {against}: no variant of this study{nearest(against, known)}. It has {', '.join(known)}"
        )


def at_equal_recall(outcomes: Iterable[Outcome], against: str = BASELINE) -> dict[float, dict[str, Measured]]:
    """Background false positives by variant, at the highest recall that every finished run reaches, and at half of it.

    Each run has there a score threshold of its own: one score means another thing to each detector.

    Returns:
        By recall; empty where there is none that all reach, or runs were scored before this was measured.
    """
    counts: dict[str, dict[int, dict[float, int]]] = {}
    for run in outcomes:
        if run.results is not None:
            reached = run.evaluations[-1].get("errors", {}).get("background_at_recall", [])
            counts.setdefault(run.variant, {})[run.seed] = {entry["recall"]: entry["count"] for entry in reached}
    recalls = [set(reached) for by_seed in counts.values() for reached in by_seed.values()]
    common = sorted(set.intersection(*recalls)) if recalls else []
    found = {}
    for recall in dict.fromkeys((common[(len(common) - 1) // 2], common[-1])) if common else ():
        values = {name: {seed: reached[recall] for seed, reached in runs.items()} for name, runs in counts.items()}
        baseline = values.get(against)
        found[recall] = {name: measured(v, baseline if name != against else None) for name, v in values.items()}
    return found


def teacher_ap(outcomes: Iterable[Outcome]) -> float | None:
    """The teacher's AP, which each run with a teacher reports."""
    return next((o.results["teacher"]["AP"] for o in outcomes if o.results and o.results.get("teacher")), None)


@dataclass(frozen=True)
class Sweep:
    """A variant over values of settings. points: in the order of the values; best: the highest AP of the finished."""

    base: str
    keys: tuple[str, ...]
    points: list[tuple[SweepPoint, Row]]
    best: Row | None


def sweeps(variants: dict[str, Variant], rows: Sequence[Row]) -> list[Sweep]:
    """The sweeps among the variants."""
    by_name = {row.variant: row for row in rows}
    groups: dict[tuple[str, ...], list[tuple[SweepPoint, Row]]] = {}
    for name, variant in variants.items():
        if isinstance(variant, SweepPoint):
            groups.setdefault(variant.sweep, []).append((variant, by_name[name]))
    found = []
    for (base, *keys), points in groups.items():
        points.sort(key=lambda point: [_order(value) for value in point[0].settings.values()])
        whole = [row for _, row in points if row.finished == row.runs and "AP" in row.measured]
        found.append(
            Sweep(base, tuple(keys), points, max(whole, key=lambda row: row.measured["AP"].mean, default=None))
        )
    return found


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    number = isinstance(value, int | float)
    return not number, value if number else 0.0, str(value)


def main_rows(variants: dict[str, Variant], rows: Sequence[Row], against: str = BASELINE) -> list[Row]:
    """The rows of the main table: of a sweep its best point alone, and the one that differences are to."""
    shown = {against} | {sweep.best.variant for sweep in sweeps(variants, rows) if sweep.best is not None}
    return [row for row in rows if row.variant in shown or not isinstance(variants[row.variant], SweepPoint)]
