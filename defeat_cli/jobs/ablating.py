"""One `defeat ablate`: what a study needs of detectors and data, given to it as calls."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from defeat_cli import session
from defeat_cli.ablation.running import Calls, run_study
from defeat_cli.ablation.study import Study
from defeat_cli.config.schema import Recipe
from defeat_cli.detectors.contract import Detector
from defeat_cli.jobs import training


def ablate(study: Study, *, jobs: int | None = None, sort: str = "AP", quiet: bool = False) -> dict[str, str]:
    """Run a study; see `run_study`."""
    teachers: dict[str, Detector] = {}
    calls = Calls(
        check=lambda recipe: check(recipe, teachers),
        obtain_teacher=lambda recipe, folder: training.obtain_teacher(recipe, folder, quiet=quiet),
        command=command,
    )
    return run_study(study, calls, jobs=jobs, sort=sort, quiet=quiet)


def command(folder: Path, epoch: int) -> list[str]:
    """What trains the run in a folder up to an epoch."""
    return [sys.executable, "-m", "defeat_cli.jobs.worker", str(folder), str(epoch)]


def check(recipe: Recipe, teachers: dict[str, Detector]) -> tuple[int, list[str]]:
    """Build what a run is made of; its training steps, and what is to be said of it.

    Args:
        teachers: those that were read already, by checkpoint; one that is read now is added.

    Raises:
        DefeatError: the run could not be started.
    """
    said: list[str] = []
    session.choose_device(recipe.run.device, recipe.run.precision)
    data = session.open_data(recipe.data, "train", train=True)
    session.open_data(recipe.data, "val", train=False)
    student = session.build_student(recipe, data.classes)
    checkpoint = recipe.teacher.checkpoint
    if checkpoint is not None and recipe.distillation.active:
        if checkpoint not in teachers:
            teachers[checkpoint] = session.load_detector(
                checkpoint, architecture=recipe.teacher.architecture, classes=data.classes, data=recipe.data
            ).detector
        session.build_distiller(recipe.distillation, student, teachers[checkpoint], said.append)
    batches = math.ceil(len(data) / recipe.data.batch_size)
    return recipe.schedule.epochs * math.ceil(batches / recipe.optimizer.accumulate), said
