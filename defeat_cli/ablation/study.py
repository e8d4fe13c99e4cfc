"""A study: variants x seeds, each an ordinary run in a folder of its own, under one study folder.

    STUDY/
      study.yaml          the variants (name -> summary, overrides) and the seeds
      recipe.yaml         the recipe that all runs share
      teacher/            where the recipe trains its teacher: once, for all runs
      VARIANT-seedN/      a run; log.txt holds what it printed, and its traceback where it failed
      study.csv .json .md .png

Runs of one seed start from the same student and see the same images in the same order, for the engine derives both
from `run.seed` alone: variants differ in nothing but their overrides. A study can be called again: it goes on where it
stopped, and takes further variants and seeds, but no other recipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from defeat_cli.ablation import report
from defeat_cli.ablation.picture import draw_study
from defeat_cli.ablation.processes import LOG, Events, environments, locked, run_in_processes
from defeat_cli.ablation.progress import StudyProgress
from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe
from defeat_cli.config.variants import Variant, find_variant
from defeat_cli.config.yaml import read_yaml
from defeat_cli.console import Reporter, console, percent
from defeat_cli.console import show as show_table
from defeat_cli.engine.runs import RECIPE, RunFolder
from defeat_cli.errors import DefeatError, RecipeError, RunError
from defeat_cli.files import replacing
from defeat_cli.jobs import training
from defeat_cli.session import Session, assemble

STUDY = "study.yaml"


@dataclass(frozen=True)
class Study:
    """variants: in the order given, `none` first; recipe: what all runs share."""

    folder: Path
    variants: dict[str, Variant]
    seeds: list[int]
    recipe: Recipe

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
        overrides = {
            **({"teacher.checkpoint": teacher} if teacher is not None else {}),
            **self.variants[name].overrides,
            "run.seed": seed,
            "run.name": run_name(name, seed),
            "run.compare_plain": False,  # `none` is the plain student
        }
        content = recipes.merged(self.recipe.model_dump(), overrides, f"variant {name}:")
        return recipes.validate(content, f"the recipe of variant {name}")

    def save(self) -> None:
        """Write study.yaml and recipe.yaml."""
        RunFolder(self.folder).open(self.recipe, resume=True)
        variants = {name: {"summary": v.summary, "overrides": v.overrides} for name, v in self.variants.items()}
        with replacing(self.folder / STUDY) as temporary:
            content = {"variants": variants, "seeds": self.seeds}
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
    return f"{re.sub(r'[^A-Za-z0-9._+-]', '_', variant)}-seed{seed}"


def plan(folder: Path, names: Sequence[str], known: dict[str, Variant], seeds: Sequence[int], recipe: Recipe) -> Study:
    """A study of these variants and seeds, and of those that the folder's study has already; nothing is written.

    Args:
        names: variants by name; `none` is always among them.
        known: the variants that there are.
        recipe: what all runs share.

    Raises:
        RecipeError: no such variant (names the nearest), a variant that makes no usable recipe, or no teacher.
        RunError: unusable seeds, or a folder that holds something else.
    """
    variants = {name: find_variant(name, known) for name in (report.BASELINE, *names)}
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RunError(f"--seeds {','.join(map(str, seeds))}: give whole numbers from 0, each once, e.g. 0,1,2")
    if recipe.teacher.checkpoint is None and recipe.teacher.recipe is None and len(variants) > 1:
        raise RecipeError("a study needs a teacher: give one with --teacher, or as teacher.recipe in the recipe")
    seeds = list(seeds)
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
    study = Study(folder, variants, seeds, recipe)
    study.runs()
    return study


def read_study(folder: Path) -> Study:
    """The study that a folder holds.

    Raises:
        RunError: it holds none.
    """
    if not (folder / STUDY).is_file():
        raise RunError(f"{folder}: holds no study ({STUDY} is not there)")
    content = read_yaml(folder / STUDY)
    variants = {name: Variant(entry["summary"], entry["overrides"]) for name, entry in content["variants"].items()}
    return Study(folder, variants, content["seeds"], recipes.load(str(folder / RECIPE)))


def run_study(study: Study, *, jobs: int | None = None, sort: str = "AP", quiet: bool = False) -> dict[str, str]:
    """Train what is not trained yet, and write the report after every run.

    Args:
        jobs: runs side by side; None takes one a GPU, and one on CPU.

    Returns:
        Run name -> why it failed; empty where all went well. Failed runs are tried again at the next call.

    Raises:
        DefeatError: the data, teacher, device or folders cannot be used; found before anything is trained, save that a
            teacher to be trained comes first.
        Interrupted: asked to stop; what was under way is saved.
    """
    report.check_sort(sort)
    slots = environments(study.recipe.run.device, jobs)
    reporter = Reporter("study", quiet)
    _check_parts(study.runs(), reporter)
    study.folder.mkdir(parents=True, exist_ok=True)
    with locked(study.folder) as lock:
        study.save()
        # Resolved, for the path becomes part of the runs' recipes, which a later call must find unchanged.
        teacher = None
        if study.recipe.teacher.checkpoint is None and study.recipe.teacher.recipe is not None:
            teacher = training.train_teacher(study.recipe, study.folder.resolve(), quiet=quiet)
        runs = study.runs(teacher)
        for run in runs:
            RunFolder(run.folder).check(run.recipe, resume=True)
        steps = _check_parts(runs, reporter)
        return _work_through(study, runs, steps, slots, lock, sort, quiet)


def _check_parts(runs: list[PlannedRun], reporter: Reporter) -> dict[str, int]:
    """Open the data and build what the first seed's runs are made of, so that what cannot work is found now.

    Returns:
        Run name -> its training steps.
    """
    like: Session | None = None
    steps: dict[str, int] = {}
    remarks: dict[str, list[str]] = {}
    for run in runs:
        if run.seed != runs[0].seed:
            steps[run.name] = steps[run_name(run.variant, runs[0].seed)]
            continue
        try:
            said: list[str] = []
            like = _check_run(run.recipe, like, said.append)
            steps[run.name] = like.steps
            for text in said:
                remarks.setdefault(text, []).append(run.variant)
        except DefeatError as error:
            raise type(error)(f"variant {run.variant}: {error}") from None
    for text, variants in remarks.items():
        reporter.warn(f"{text} ({', '.join(variants)})")
    return steps


def _check_run(recipe: Recipe, like: Session | None, say: Callable[[str], None]) -> Session:
    """Assemble what a run is made of, and pass on its warnings."""
    session = assemble(recipe, like=like)
    for note in session.notes:
        if note.warning:
            say(note.text)
    return session


def _work_through(
    study: Study,
    runs: list[PlannedRun],
    steps: dict[str, int],
    slots: list[dict[str, str]],
    lock: int | None,
    sort: str,
    quiet: bool,
) -> dict[str, str]:
    by_folder = {run.folder: run for run in runs}
    pending = [run for run in runs if not RunFolder(run.folder).finished]
    done = {run.name for run in runs} - {run.name for run in pending}
    failures: dict[str, str] = {}
    for run in pending:
        RunFolder(run.folder).open(run.recipe, resume=True)

    def step(name: str) -> int:
        metrics = RunFolder(study.folder / name).metrics()
        return metrics[-1]["step"] if metrics else 0

    def ended(folder: Path, failure: str | None) -> None:
        run = by_folder[folder]
        if failure is None:
            progress.finished(run.name, f"AP {percent(RunFolder(folder).results()['student']['AP'])}")
        else:
            failures[run.name] = failure
            progress.finished(run.name, f"[red]failed[/], see {folder / LOG}")
        write_report(study, sort)

    with StudyProgress(steps, step, done, quiet) as progress:
        events = Events(lambda folder: progress.started(folder.name), ended, progress.polled)
        run_in_processes([run.folder for run in pending], slots, lock, events)
    write_report(study, sort)
    return failures


def write_report(study: Study, sort: str = "AP") -> tuple[list[report.Outcome], list[report.Row]]:
    """Write study.csv, .json, .md and .png from what the run folders hold now.

    Returns:
        All outcomes, and the rows of the table.
    """
    outcomes = [
        report.read_outcome(name, seed, study.folder / run_name(name, seed))
        for seed in study.seeds
        for name in study.variants
    ]
    summaries = {name: variant.summary for name, variant in study.variants.items()}
    title = f"{study.folder.name}: {study.recipe.run.name}, {study.recipe.schedule.epochs} epochs"
    rows = report.summarize(outcomes, sort)
    report.write_csv(rows, study.folder / "study.csv")
    report.write_json_report(outcomes, rows, study.folder / "study.json")
    report.write_markdown(outcomes, rows, title, summaries, study.folder / "study.md")
    draw_study(outcomes, rows, title, study.folder / "study.png")
    return outcomes, rows


def show(study: Study, sort: str = "AP") -> None:
    """Write the report and print its tables."""
    outcomes, rows = write_report(study, sort)
    for table in report.tables(rows, study.folder.name, console):
        show_table(table)
    console.print(report.legend(outcomes), soft_wrap=True)
