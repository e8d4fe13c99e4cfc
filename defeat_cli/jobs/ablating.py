"""One `defeat ablate`: what a study needs of detectors and data, given to it as calls."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from defeat_cli.ablation.running import Calls, run_study
from defeat_cli.ablation.study import Study
from defeat_cli.config.schema import Recipe
from defeat_cli.console import counting
from defeat_cli.engine.stopping import stoppable
from defeat_cli.jobs import training
from defeat_cli.jobs.beside import command
from defeat_cli.session import Session, assemble


def ablate(
    study: Study, *, jobs: int | None = None, gpus_per_run: int = 1, sort: str = "AP", quiet: bool = False
) -> dict[str, str]:
    """Run a study; see `run_study`."""
    with interruptible():
        return run_study(
            study, calls(quiet, gpus_per_run), jobs=jobs, gpus_per_run=gpus_per_run, sort=sort, quiet=quiet
        )


def interruptible() -> AbstractContextManager[None]:
    """Within, a signal ends a study with what a user is to know."""
    return stoppable(lambda: "the study is stopped; the same command goes on with it")


def calls(quiet: bool = False, gpus_per_run: int = 1, home: Path | None = None) -> Calls:
    """Args: home: folder whose `teacher/` holds the teacher that the recipe trains; None takes the study's own."""
    last: Session | None = None

    def check(recipe: Recipe) -> tuple[int, list[str]]:
        nonlocal last
        last = assemble(recipe, like=last, watch=partial(counting, quiet=quiet))
        return last.steps, [note.text for note in last.notes if note.warning]

    def obtain_teacher(recipe: Recipe, folder: Path) -> str | None:
        trained_here = recipe.teacher.checkpoint is None and recipe.teacher.recipe is not None
        return training.train_teacher(recipe, home or folder, quiet=quiet) if trained_here else None

    return Calls(check, obtain_teacher, partial(command, processes=gpus_per_run))
