"""A study by a protocol: two ordinary studies, the second of what the first has chosen.

    FOLDER/
      protocol.yaml, recipe.yaml     what was asked
      teacher/                       where the recipe trains its teacher
      features/                      what runs keep of the teacher's for each other; gone at the end
      tuning/                        a study of the sweeps, on tuning seeds
      final/                         a study of each variant at its best values, on other seeds, and of LONGER
      pictures/, report.md, .html    one page of it all

What was chosen stays: once `final` is begun its study.yaml says what each variant is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from defeat_cli.ablation.choice import BASELINE, SweepPoint
from defeat_cli.ablation.rows import Outcome, Sweep
from defeat_cli.ablation.study import STUDY, Study, plan
from defeat_cli.config import protocol as protocols
from defeat_cli.config.protocol import BEST, OFF, TUNING_SEEDS, Protocol
from defeat_cli.config.schema import Recipe, Schedule, nearest
from defeat_cli.config.variants import Variant
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import RecipeError, RunError
from defeat_cli.files import replacing
from defeat_cli.text import counted

PROTOCOL, TUNING, FINAL = "protocol.yaml", "tuning", "final"
LONGER = f"{BASELINE}-longer"
"""The plain student that trains for as long as a distilled one takes."""


@dataclass(frozen=True)
class ProtocolStudy:
    """A study by a protocol, before anything is trained.

    variants: what the protocol's names mean, points of sweeps among them. optional: as `Study.optional`.
    """

    folder: Path
    protocol: Protocol
    recipe: Recipe
    variants: Mapping[str, Variant]
    optional: frozenset[str] = frozenset()

    @property
    def sweeps(self) -> dict[tuple[str, ...], list[SweepPoint]]:
        """The points of each sweep; a sweep is named by its variant and keys."""
        found: dict[tuple[str, ...], list[SweepPoint]] = {}
        for variant in self.variants.values():
            if isinstance(variant, SweepPoint):
                found.setdefault(variant.sweep, []).append(variant)
        return found

    def tuning(self) -> Study | None:
        """The study that chooses; None where there is nothing to choose."""
        if not self.sweeps:
            return None
        points = {n: v for n, v in self.variants.items() if isinstance(v, SweepPoint) or n == BASELINE}
        seeds = self.protocol.tuning_seeds or TUNING_SEEDS
        return plan(self.folder / TUNING, points, seeds, self.recipe, self.protocol.budget)

    def final(self, best: Mapping[tuple[str, ...], SweepPoint]) -> Study:
        """The study that is reported, with the point chosen of each sweep under the name of its variant."""
        variants: dict[str, Variant] = {}
        for name, variant in self.variants.items():
            if isinstance(variant, SweepPoint):
                name, point = variant.base, best[variant.sweep]
                variant = Variant(point.summary, point.overrides)
            variants[name] = variant
        return plan(self.folder / FINAL, variants, self.protocol.seeds, self.recipe, None, self.optional)

    def foreseen(self) -> Study:
        """The study that is reported, where something is yet to be chosen with the first value of each sweep."""
        if self.begun():
            return plan(self.folder / FINAL, {}, self.protocol.seeds, self.recipe, None, self.optional)
        return self.final({sweep: points[0] for sweep, points in self.sweeps.items()})

    def begun(self) -> bool:
        """Whether the choice is made."""
        return (self.folder / FINAL / STUDY).is_file()

    def save(self) -> None:
        """Write protocol.yaml and recipe.yaml."""
        RunFolder(self.folder).open(self.recipe, resume=True)
        with replacing(self.folder / PROTOCOL) as temporary:
            temporary.write_text(yaml.safe_dump(self.protocol.model_dump(), sort_keys=False), encoding="utf-8")


def prepare(
    folder: Path, protocol: Protocol, variants: Mapping[str, Variant], optional: set[str], recipe: Recipe
) -> ProtocolStudy:
    """Find out, writing nothing, whether a protocol can be followed in a folder.

    Raises:
        DefeatError: what `plan` refuses; variants that would have one name; options without effect; a folder that holds
            something else, or a study by another protocol (further `seeds` are taken).
    """
    asked = ProtocolStudy(folder, protocol, recipe, variants, frozenset(optional))
    _refuse_equal_names(asked)
    if not asked.sweeps:
        for name in ("tuning_seeds", "budget"):
            if getattr(protocol, name) is not None:
                raise RecipeError(f"{name}: nothing is swept, e.g. neck:alpha_bg=1,4,16; leave it out")
    elif set(TUNING_SEEDS) & set(protocol.seeds) and protocol.tuning_seeds is None:
        raise RecipeError(f"seeds: {TUNING_SEEDS} are the tuning seeds where none are given; report other seeds")
    names = {variant.base if isinstance(variant, SweepPoint) else name for name, variant in variants.items()}
    if protocol.equal_time not in (names - {BASELINE}) | {BEST, OFF}:
        known = sorted(names - {BASELINE})
        raise RecipeError(
            f"equal_time: {protocol.equal_time} is not compared{nearest(protocol.equal_time, known)}; "
            f"give {', '.join([BEST, OFF, *known])}"
        )
    if names == {BASELINE}:
        raise RecipeError(f"variants: name one or more to compare with {BASELINE}, e.g. neck:alpha_bg=1,4,16")
    if recipe.run.patience is not None:
        raise RecipeError("run.patience: a protocol compares at equal epochs; leave it out")
    asked = _with_seeds_before(asked)
    asked.tuning()
    asked.foreseen()
    return asked


def _refuse_equal_names(asked: ProtocolStudy) -> None:
    swept = [sweep[0] for sweep in asked.sweeps]
    fixed = [name for name, v in asked.variants.items() if not isinstance(v, SweepPoint) and name != BASELINE]
    for name in swept:
        if swept.count(name) > 1 or name in fixed:
            raise RecipeError(
                f"variants: {name} stands for more than one variant; a sweep's best is reported by the variant's name. "
                "Name each once, or make one of your own with --variants"
            )
    for name in (LONGER, BEST, OFF):
        if name in swept + fixed:
            raise RecipeError(f"variants: {name} means something else in a protocol; rename the variant")


def _with_seeds_before(asked: ProtocolStudy) -> ProtocolStudy:
    """With the seeds too that the folder's study has already."""
    folder = asked.folder
    if (folder / STUDY).is_file() or (RunFolder(folder).exists and not (folder / PROTOCOL).is_file()):
        raise RunError(f"{folder}: holds something that is no study by a protocol; choose another --output")
    if not (folder / PROTOCOL).is_file():
        return asked
    RunFolder(folder).check(asked.recipe, resume=True)
    if RunFolder(folder).prolonged_by(asked.recipe):
        raise RunError(f"{folder}: its study has another number of epochs; choose another --output")
    before = protocols.read(folder / PROTOCOL)
    seeds = [*before.seeds, *(seed for seed in asked.protocol.seeds if seed not in before.seeds)]
    now = asked.protocol.model_copy(update={"seeds": seeds})
    for key in Protocol.model_fields.keys() - {"seeds"}:
        there, here = getattr(before, key), getattr(now, key)
        if there != here:
            raise RunError(f"{folder}: its study has {key} {there!r}, not {here!r}; choose another --output")
    protocols.make(now.model_dump(), f"{folder}: the protocol")
    return ProtocolStudy(folder, now, asked.recipe, asked.variants, asked.optional)


def chosen(sweeps: Sequence[Sweep]) -> dict[tuple[str, ...], SweepPoint]:
    """The best point of each sweep.

    Raises:
        RunError: a sweep has none that was trained to the end.
    """
    best = {}
    for sweep in sweeps:
        if sweep.best is None:
            raise RunError(
                f"{TUNING}: no value of {', '.join(sweep.keys)} of {sweep.base} was trained to the end on all tuning "
                "seeds; the runs' log.txt say why, and the same command tries again"
            )
        best[(sweep.base, *sweep.keys)] = next(point for point, row in sweep.points if row is sweep.best)
    return best


def at_the_edge(sweep: Sweep) -> list[str]:
    """Settings of a sweep whose best value ends three or more numbers: a better one may lie beyond."""
    best = next((point for point, row in sweep.points if row is sweep.best), None)
    if best is None:
        return []
    found = []
    for key, value in best.settings.items():
        tried = sorted({p.settings[key] for p, _ in sweep.points if isinstance(p.settings[key], int | float)})
        if len(tried) > 2 and value in (tried[0], tried[-1]):
            found.append(key)
    return found


def as_long_as(variant: str, outcomes: Sequence[Outcome], plain: Variant, schedule: Schedule) -> Variant | None:
    """The plain student that gets a variant's training time: its schedule stretched, all else the same.

    Args:
        variant: or `best`, the one with the best mean AP at the last epoch.
        outcomes: of the final study. plain: the variant `none`. schedule: the recipe's.

    Returns:
        It; None where no seed has both, or their times (the median over seeds of the ratio) differ by less than half
        an epoch.
    """
    seconds: dict[str, dict[int, float]] = {}
    aps: dict[str, list[float]] = {}
    for run in outcomes:
        if run.results is not None:
            seconds.setdefault(run.variant, {})[run.seed] = run.results["training_seconds"]
            aps.setdefault(run.variant, []).append(run.evaluations[-1]["AP"])
    others = [name for name in aps if name not in (BASELINE, LONGER)]
    if variant == BEST:
        variant = max(others, key=lambda name: fmean(aps[name]), default=None)
    plain_seconds = seconds.get(BASELINE, {})
    ratios = [time / plain_seconds[s] for s, time in seconds.get(variant, {}).items() if s in plain_seconds]
    overrides = {**plain.overrides, **stretched(schedule, plain.overrides, median(ratios))} if ratios else {}
    epochs = overrides.get("schedule.epochs")
    if epochs in (None, plain.overrides.get("schedule.epochs", schedule.epochs)):
        return None
    return Variant(f"the student alone, for {counted(epochs, 'epoch')}: as long as {variant} takes", overrides)


def stretched(schedule: Schedule, overrides: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """Overrides that make a schedule `ratio` times as long, of the same shape; never shorter.

    Args:
        overrides: of a variant, which may change the schedule.
    """

    def now(key: str) -> Any:
        return overrides.get(f"schedule.{key}", getattr(schedule, key))

    epochs = max(now("epochs"), floor(now("epochs") * ratio + 0.5))
    ratio = epochs / now("epochs")
    # Halves go up, so that milestones that differ still do.
    return {
        "schedule.epochs": epochs,
        "schedule.milestones": [floor(milestone * ratio + 0.5) for milestone in now("milestones")],
        "schedule.warmup_steps": floor(now("warmup_steps") * ratio + 0.5),
    }
