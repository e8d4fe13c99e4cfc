"""One run of a study in a process of its own: `python -m defeat_cli.jobs.worker FOLDER EPOCH [PROCESSES [FEATURES]]`.

Trains the recipe.yaml in the folder up to an epoch, from wherever the run stands, as `defeat train --resume` would. The
process that started it holds the other end of its stdin: when that closes, whatever the reason, the run stops, saved.
With several processes this one starts them, and they train. In the folder FEATURES, where one is given, runs keep the
teacher's features for each other.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe
from defeat_cli.console import console
from defeat_cli.engine.launching import launch, started_by_another
from defeat_cli.engine.runs import RECIPE, RunFolder
from defeat_cli.engine.stopping import stop_requested
from defeat_cli.errors import Ended, Interrupted
from defeat_cli.jobs import training
from defeat_cli.jobs.together import working_together

STOPPED = 130


def main(folder: Path, epoch: int, processes: int = 1, features: Path | None = None) -> int:
    """Exit status: 0 trained up to the epoch, STOPPED saved and stopped before. Errors leave as tracebacks."""
    if not started_by_another():
        threading.Thread(target=_stop_when_alone, daemon=True).start()
        if processes > 1:
            arguments = [str(folder), str(epoch), "1", *([str(features)] if features is not None else [])]
            return launch(processes, [__spec__.name, *arguments])
    recipe = recipes.load(str(folder / RECIPE))
    known = partial(known_teacher, recipe, folder)
    try:
        # A batch system asks every process to stop, and then the study asks us again: that is one request.
        with stop_requested(patient=True), working_together() as world:
            options = {"known_teacher": known, "world": world, "features": features}
            training.train(recipe, folder, resume=True, until=epoch, **options)
    except Ended:
        return 1
    except Interrupted as stop:
        console.print(escape(str(stop)), soft_wrap=True)
        reached = any(entry["kind"] == "eval" and entry["epoch"] >= epoch for entry in RunFolder(folder).metrics())
        return 0 if reached else STOPPED
    return 0


def known_teacher(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The teacher's figures from a finished run beside this one, with the same teacher on the same data."""
    for run in map(RunFolder, folder.parent.iterdir()):
        figures = run.results().get("teacher") if run.finished else None
        if figures and _scored_on(recipes.load(str(run / RECIPE))) == _scored_on(recipe):
            return figures
    return None


def _scored_on(recipe: Recipe) -> tuple[object, ...]:
    """All that a teacher's figures depend on."""
    return recipe.teacher, recipe.data, recipe.run.precision


def _stop_when_alone() -> None:
    # Not sys.stdin: its lock, held by this thread at exit, would crash the interpreter.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), *map(Path, sys.argv[4:])))
