"""One `defeat ablate`: what a study needs of detectors and data, given to it as calls."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from defeat_cli.ablation.running import Calls, run_study
from defeat_cli.ablation.study import Study
from defeat_cli.config.schema import Recipe
from defeat_cli.console import counting
from defeat_cli.distillation import map_folder
from defeat_cli.engine.stopping import stoppable
from defeat_cli.jobs import training
from defeat_cli.jobs.beside import command
from defeat_cli.session import Session, assemble

FEATURES = "features"
"""Folder of a study in which its runs keep the teacher's features for each other, where `teacher.cache_gib` is set."""


def ablate(
    study: Study, *, jobs: int | None = None, gpus_per_run: int = 1, sort: str = "AP", quiet: bool = False
) -> dict[str, str]:
    """Run a study; see `run_study`."""
    several = sum(bool(run.recipe.distillation.terms) for run in study.runs()) > 1
    # Resolved, for the path becomes part of the runs' recipes, which a later call must find unchanged.
    called = calls(study.folder.resolve(), quiet, gpus_per_run, share_features=several)
    with interruptible():
        failures = run_study(study, called, jobs=jobs, gpus_per_run=gpus_per_run, sort=sort, quiet=quiet)
    if not failures:
        map_folder.remove(study.folder / FEATURES)
    return failures


def interruptible() -> AbstractContextManager[None]:
    """Within, a signal ends a study with what a user is to know."""
    return stoppable(lambda: "the study is stopped; the same command goes on with it")


def calls(home: Path, quiet: bool = False, gpus_per_run: int = 1, share_features: bool = True) -> Calls:
    """Args: home: folder of what runs share: the teacher that the recipe trains, and, where asked, its features."""
    last: Session | None = None

    def check(recipe: Recipe) -> tuple[int, list[str]]:
        nonlocal last
        last = assemble(recipe, like=last, watch=partial(counting, quiet=quiet))
        return last.steps, [note.text for note in last.notes if note.warning]

    def obtain_teacher(recipe: Recipe) -> str | None:
        trained_here = recipe.teacher.checkpoint is None and recipe.teacher.recipe is not None
        return training.train_teacher(recipe, home, quiet=quiet) if trained_here else None

    features = home / FEATURES if share_features else None
    return Calls(check, obtain_teacher, partial(command, processes=gpus_per_run, features=features))
