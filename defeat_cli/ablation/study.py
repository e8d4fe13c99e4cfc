"""A study: variants x seeds, each an ordinary run in a folder of its own, under one study folder.

    STUDY/
      study.yaml          the variants (name -> summary, overrides, and of a sweep what it varies), seeds and budget
      recipe.yaml         the recipe that all runs share
      teacher/            where the recipe trains its teacher: once, for all runs
      features/           what runs keep of the teacher's for each other (`teacher.cache_gib`); gone at the end
      VARIANT-seedN/      a run; log.txt holds what it printed, and its traceback where it failed
      study.csv .json .md .png, sweeps.png

Runs of one seed start from the same student and see the same images in the same order, for the engine derives both
from `run.seed` alone: variants differ in nothing but their overrides. A study can be called again: it goes on where it
stopped, and takes further variants and seeds, but no other recipe.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from defeat_cli.ablation.choice import BASELINE, SweepPoint
from defeat_cli.ablation.halving import Standing, standing, stops
from defeat_cli.ablation.rows import Outcome, read_outcome
from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe
from defeat_cli.config.variants import Variant
from defeat_cli.config.yaml import read_yaml
from defeat_cli.engine.runs import RECIPE, RunFolder
from defeat_cli.errors import RecipeError, RunError
from defeat_cli.files import replacing

STUDY = "study.yaml"
OWN_KEYS = {"run.seed": "--seeds", "run.name": "--output", "run.compare_plain": f"the variant {BASELINE}"}
"""Recipe keys that a study sets for each run itself, and what says the same to it."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    variants: in the order given, `none` first. recipe: what all runs share. budget: of each sweep, see halving.
    optional: variants that are left out where teacher and student cannot have their terms, for nobody named them.
    """

    folder: Path
    variants: dict[str, Variant]
    seeds: list[int]
    recipe: Recipe
    budget: float | None = None
    optional: frozenset[str] = frozenset()

    def runs(self, teacher: str | None = None) -> list[PlannedRun]:
        """Every run, seed by seed, so that a study stopped early has whole comparisons.

        Args:
            teacher: checkpoint that all use in place of the recipe's.

        Raises:
            RecipeError: a variant makes a recipe that cannot be used.
        """
        return [
            PlannedRun(name, seed, self.folder / run_name(name, seed), self._recipe(name, seed, teacher))
            for seed in self.seeds
            for name in self.variants
        ]

    def _recipe(self, name: str, seed: int, teacher: str | None) -> Recipe:
        overrides = self.variants[name].overrides
        for key in overrides.keys() & OWN_KEYS:
            raise RecipeError(f"variant {name}: a study sets {key} itself; give {OWN_KEYS[key]} instead")
        overrides = {
            **({"teacher.checkpoint": teacher} if teacher is not None else {}),
            **overrides,
            "run.seed": seed,
            "run.name": run_name(name, seed),
            "run.compare_plain": False,  # `none` is the plain student
        }
        content = recipes.merged(self.recipe.model_dump(), overrides, f"variant {name}:")
        return recipes.validate(content, f"the recipe of variant {name}")

    def outcomes(self) -> list[Outcome]:
        """What the run folders hold now."""
        return [
            read_outcome(name, seed, self.folder / run_name(name, seed))
            for seed in self.seeds
            for name in self.variants
        ]

    def halvings(self) -> dict[tuple[str, ...], list[int]]:
        """The stops of each sweep that the budget cuts short; a sweep is named by its variant and keys.

        Raises:
            RunError: the budget is too small for one of them.
        """
        if self.budget is None:
            return {}
        sizes: dict[tuple[str, ...], int] = {}
        for variant in self.variants.values():
            if isinstance(variant, SweepPoint):
                sizes[variant.sweep] = sizes.get(variant.sweep, 0) + 1
        if any("schedule.epochs" in sweep for sweep in sizes):
            raise RunError("--budget: a sweep over schedule.epochs cannot be halved by epochs; leave --budget out")
        if sizes and self.recipe.run.patience is not None:
            raise RunError("--budget and run.patience both stop runs early; leave one out")
        # Where evaluations are counted in steps, the epoch that a run stops at is evaluated all the same.
        epochs, every = self.recipe.schedule.epochs, 1
        if self.recipe.run.evaluate_steps is None:
            every = self.recipe.run.evaluate_every
        return {sweep: stops(size, epochs, self.budget, every) for sweep, size in sizes.items()}

    def standing(self, outcomes: Sequence[Outcome], failed: frozenset[str] = frozenset()) -> Standing:
        """How far the values of sweeps are to be trained now, by variant; see halving."""
        aims: dict[str, int] = {}
        stopped: set[str] = set()
        for sweep, stops_of_sweep in self.halvings().items():
            curves: dict[str, list[dict[int, float]]] = {}
            for outcome in outcomes:
                variant = self.variants[outcome.variant]
                if isinstance(variant, SweepPoint) and variant.sweep == sweep:
                    curves.setdefault(outcome.variant, []).append(outcome.curve)
            now = standing(curves, stops_of_sweep, failed)
            aims |= now.aims
            stopped |= now.stopped
        return Standing(aims, stopped)

    def save(self) -> None:
        """Write study.yaml and recipe.yaml."""
        RunFolder(self.folder).open(self.recipe, resume=True)
        variants = {name: asdict(variant) for name, variant in self.variants.items()}
        with replacing(self.folder / STUDY) as temporary:
            content = {"variants": variants, "seeds": self.seeds, "budget": self.budget}
            temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    variant: str
    seed: int
    folder: Path
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.folder.name


def run_name(variant: str, seed: int) -> str:
    """A run's folder: the variant's name, with `_` for what a file system may not like, and the seed."""
    return f"{re.sub(r'[^A-Za-z0-9._+=-]', '_', variant)}-seed{seed}"


def plan(
    folder: Path,
    variants: Mapping[str, Variant],
    seeds: Sequence[int],
    recipe: Recipe,
    budget: float | None = None,
    optional: Collection[str] = (),
) -> Study:
    """A study of these variants and seeds, and of those that the folder's study has already; nothing is written.

    Args:
        variants, optional: as `choice.choose` gives them.
        recipe: what all runs share.
        budget: see halving.

    Raises:
        RecipeError: a variant makes no usable recipe, or there is no teacher.
        RunError: unusable seeds or budget, or a folder that holds something else.
    """
    variants, seeds = dict(variants), list(seeds)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RunError(f"--seeds {','.join(map(str, seeds))}: give whole numbers from 0, each once, e.g. 0,1,2")
    if (folder / STUDY).is_file():
        RunFolder(folder).check(recipe, resume=True)
        before = read_study(folder)
        for name in variants.keys() & before.variants.keys():
            if before.variants[name].overrides != variants[name].overrides:
                raise RunError(
                    f"{folder}: holds a study in which variant {name} is another one; choose another --output"
                )
        variants = {**before.variants, **variants}
        seeds = [*before.seeds, *(seed for seed in seeds if seed not in before.seeds)]
    elif RunFolder(folder).exists:
        raise RunError(f"{folder}: holds a run, not a study; choose another --output")
    folders = {run_name(name, 0): name for name in variants}
    for name in variants:
        if folders[run_name(name, 0)] != name:
            raise RecipeError(f"variants {name} and {folders[run_name(name, 0)]} would share a folder; rename one")
    if budget is not None and not any(isinstance(variant, SweepPoint) for variant in variants.values()):
        raise RunError("--budget: only sweeps are cut short, and there is none, e.g. neck:alpha_bg=1,4,16")
    study = Study(folder, variants, seeds, recipe, budget, frozenset(optional))
    study.halvings()
    for run in study.runs():
        teacher = run.recipe.teacher
        if run.recipe.distillation.terms and teacher.checkpoint is None and teacher.recipe is None:
            raise RecipeError("a study needs a teacher: give one with --teacher, or as teacher.recipe in the recipe")
    return study


def read_study(folder: Path) -> Study:
    """The study that a folder holds.

    Raises:
        RunError: it holds none.
    """
    if not (folder / STUDY).is_file():
        raise RunError(f"{folder}: holds no study ({STUDY} is not there)")
    content = read_yaml(folder / STUDY)
    variants = {
        name: (SweepPoint if "base" in entry else Variant)(**entry) for name, entry in content["variants"].items()
    }
    return Study(folder, variants, content["seeds"], recipes.load(str(folder / RECIPE)), content.get("budget"))
