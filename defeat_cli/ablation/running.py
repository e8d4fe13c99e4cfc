"""Running a study: its runs in processes of their own, and the report after each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from defeat_cli.ablation.choice import BASELINE
from defeat_cli.ablation.halving import Standing
from defeat_cli.ablation.picture import draw_study
from defeat_cli.ablation.processes import LOG, environments, run_in_processes
from defeat_cli.ablation.progress import StudyProgress
from defeat_cli.ablation.report import Report
from defeat_cli.ablation.rows import Outcome, check_against, check_sort, read_outcome, summarize
from defeat_cli.ablation.study import PlannedRun, Study
from defeat_cli.ablation.sweep_picture import draw_sweeps
from defeat_cli.config.schema import Recipe
from defeat_cli.console import Reporter, percent
from defeat_cli.engine.locking import locked, refuse_locked
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import DefeatError, TermError
from defeat_cli.files import require_place_for_file, require_place_for_folder
from defeat_cli.pages.blocks import Heading, Picture, write_html
from defeat_cli.text import counted, listed

FILES = ("study.csv", "study.json", "study.md", "study.html", "study.png", "sweeps.png")
"""The report."""


@dataclass(frozen=True)
class Calls:
    """What a study needs of detectors and data.

    check: builds what a run of a recipe is made of, writes nothing; gives its training steps and what is to be said of
        it. Raises DefeatError where the run could not work.
    obtain_teacher: recipe -> the teacher that the recipe trains; None where it trains none.
    command: run folder, epoch -> what trains the folder's recipe up to that epoch, from wherever it stands. The process
        must stop, saved, when its stdin is closed.
    """

    check: Callable[[Recipe], tuple[int, list[str]]]
    obtain_teacher: Callable[[Recipe], str | None]
    command: Callable[[Path, int], Sequence[str]]


@dataclass(frozen=True)
class Task:
    """A run that is to be trained now up to an epoch; steps: training steps up to there."""

    run: PlannedRun
    epoch: int
    steps: int

    @property
    def whole(self) -> bool:
        """Whether that is its last epoch."""
        return self.epoch == self.run.recipe.schedule.epochs

    def done(self, outcome: Outcome) -> bool:
        """Whether the run is there."""
        stopped_early = outcome.results is not None and "stopped_early_at_step" in outcome.results
        if stopped_early and not RunFolder(self.run.folder).prolonged_by(self.run.recipe):
            return True
        return self.epoch in outcome.curve and (outcome.results is not None or not self.whole)


def run_study(
    study: Study,
    calls: Calls,
    *,
    jobs: int | None = None,
    gpus_per_run: int = 1,
    sort: str = "AP",
    quiet: bool = False,
) -> dict[str, str]:
    """Train what is not trained yet, and write the report after every run.

    Args:
        jobs: runs side by side; None takes as many as there are GPUs for, and one on CPU.
        gpus_per_run: processes that train each run, which `calls.command` knows too.

    Returns:
        Run name -> why it failed; empty where all went well. Failed runs are tried again at the next call.

    Raises:
        DefeatError: the data, teacher, device or folders cannot be used; found before anything is trained, save that a
            teacher to be trained comes first.
        Interrupted: asked to stop; what was under way is saved.
    """
    check_sort(sort)
    slots = environments(study.recipe.run.device, jobs, gpus_per_run)
    reporter = Reporter("study", quiet)
    require_place_for_folder(study.folder)
    for name in FILES:
        require_place_for_file(study.folder / name)
    refuse_locked(study.folder)
    steps = check_study(study, calls, reporter)
    study = replace(study, variants={name: study.variants[name] for name in steps})
    with locked(study.folder) as lock:
        study.save()
        runs = study.runs(calls.obtain_teacher(study.recipe))
        for run in runs:
            RunFolder(run.folder).check(run.recipe, resume=True)
        failures: dict[str, str] = {}
        said = ""
        while True:
            outcomes = study.outcomes()
            now = study.standing(outcomes, frozenset(run.variant for run in runs if run.name in failures))
            if stopped_text(now) != said:
                said = stopped_text(now)
                reporter.note(said)
            tasks = [_task(run, now, steps) for run in runs]
            tasks = [task for task, outcome in zip(tasks, outcomes, strict=True) if not task.done(outcome)]
            tasks = [task for task in tasks if task.run.name not in failures]
            if not tasks:
                break
            done = len(runs) - len(tasks) - len(failures)
            with StudyProgress({t.run.name: t.steps for t in tasks}, partial(_steps, study), done, quiet) as progress:
                failures |= _train(study, tasks, calls, slots, lock, progress, sort)
        write_report(study, sort)
        return failures


def _steps(study: Study, run: str) -> int:
    """Training steps that a run has taken, to its last line in metrics.jsonl."""
    metrics = RunFolder(study.folder / run).metrics()
    return metrics[-1]["step"] if metrics else 0


def _task(run: PlannedRun, now: Standing, steps: Mapping[str, int]) -> Task:
    whole = run.recipe.schedule.epochs
    epoch = now.aims.get(run.variant, whole)
    return Task(run, epoch, steps[run.variant] * epoch // whole)


def check_study(study: Study, calls: Calls, reporter: Reporter) -> dict[str, int]:
    """Check a run of each variant, so that what cannot work is found now.

    Returns:
        Variant -> training steps of a run; optional ones that teacher and student cannot have are not there.
    """
    steps: dict[str, int] = {}
    remarks: dict[str, list[str]] = {}
    for run in study.runs()[: len(study.variants)]:
        try:
            steps[run.variant], said = calls.check(run.recipe)
        except DefeatError as error:
            if run.variant in study.optional and isinstance(error, TermError):
                reporter.warn(f"variant {run.variant} is left out: {error}")
                continue
            raise type(error)(f"variant {run.variant}: {error}") from None
        for text in said:
            remarks.setdefault(text, []).append(run.variant)
    for text, variants in remarks.items():
        reporter.warn(f"{text} ({listed(variants)})")
    return steps


def _train(
    study: Study,
    tasks: Sequence[Task],
    calls: Calls,
    slots: Sequence[dict[str, str]],
    lock: int | None,
    progress: StudyProgress,
    sort: str,
) -> dict[str, str]:
    """Work through tasks; run name -> why it failed."""
    by_folder = {task.run.folder: task for task in tasks}
    failures: dict[str, str] = {}
    for task in tasks:
        RunFolder(task.run.folder).open(task.run.recipe, resume=True)

    def ended(folder: Path, failure: str | None) -> None:
        task = by_folder[folder]
        outcome = read_outcome(task.run.variant, task.run.seed, folder)
        if failure is None and not task.done(outcome):
            failure = f"ended before epoch {task.epoch}"
        if failure is None:
            share = "" if task.whole else f" at epoch {task.epoch} of {task.run.recipe.schedule.epochs}"
            progress.finished(task.run.name, f"AP {percent(outcome.evaluations[-1]['AP'])}{share}")
        else:
            failures[task.run.name] = failure
            progress.finished(task.run.name, f"failed, see {folder / LOG}")
        try:
            write_report(study, sort)
        except OSError as error:  # a full disk ends no run; at the end the report is written again
            progress.warn(f"the report could not be written: {error}")

    run_in_processes(
        {folder: calls.command(folder, task.epoch) for folder, task in by_folder.items()},
        slots,
        lock,
        started=lambda folder: progress.started(folder.name),
        ended=ended,
        polled=progress.polled,
    )
    return failures


def stopped_text(now: Standing) -> str:
    """Which values of sweeps were stopped early, and when."""
    by_epoch: dict[int, list[str]] = {}
    for name, epoch in now.aims.items():
        if name in now.stopped:
            by_epoch.setdefault(epoch, []).append(name)
    parts = [f"at epoch {epoch} {listed(names, len(names))}" for epoch, names in sorted(by_epoch.items())]
    return f"stopped early, as not in the better half: {'; '.join(parts)}" if parts else ""


def write_report(study: Study, sort: str = "AP", against: str = BASELINE) -> Report:
    """Write study.csv, .json, .md, .html and .png, and sweeps.png where there are sweeps, from what the runs hold.

    Args:
        against: the variant that differences are to.

    Raises:
        RunError: no such sort key or variant.
    """
    check_against(against, study.variants)
    outcomes = study.outcomes()
    budget = "" if study.budget is None else f"each sweep may cost {study.budget:g} whole trainings with each seed"
    notes = [text for text in (budget, stopped_text(study.standing(outcomes))) if text]
    name, run = study.folder.name, study.recipe.run.name
    title = f"{name if run in name else f'{name}: {run}'}, {counted(study.recipe.schedule.epochs, 'epoch')}"
    report = Report(title, study.variants, outcomes, summarize(outcomes, sort, against), notes, against)
    report.write(study.folder)
    pictures = [Picture(study.folder / "study.png", "AP of each variant")]
    draw_study(outcomes, report.main_rows, title, pictures[0].path, against=against)
    if report.sweeps:
        pictures.append(Picture(study.folder / "sweeps.png", "AP over the values of each sweep"))
        baseline = next(row.measured.get("AP") for row in report.rows if row.variant == against)
        draw_sweeps(report.sweeps, baseline, pictures[1].path, against=against)
    variants = [f"{row.variant}: {study.variants[row.variant].summary}" for row in report.main_rows]
    blocks = [report.legend(), *report.sheets(), *pictures, Heading("Variants"), *variants]
    write_html(study.folder / "study.html", title, blocks)
    return report
