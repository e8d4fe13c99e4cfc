"""A run and its trackers, brought together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from defeat_cli.engine.distributed import World
from defeat_cli.engine.runs import RunFolder
from defeat_cli.session import Session
from defeat_cli.tracking import Tracking, tracked


@contextmanager
def watched(session: Session, run: RunFolder, reporter: Any, world: World) -> Iterator[Tracking]:
    """The trackers that the recipe names, told of all that the run logs; those of the main process alone.

    Raises:
        RunError: one of them cannot be begun.
    """
    names, recipe = session.recipe.run.track if world.is_main else [], session.recipe.model_dump()
    with tracked(names, run.path, watched_as(run.path), recipe, reporter.warn) as tracking:
        if names:
            tracking.catch_up(run.metrics())
            run.watchers.append(tracking.take)
        yield tracking


def watched_as(folder: Path) -> str:
    """What trackers call a run: `runs/student`, and `student/plain` for one within."""
    return "/".join(folder.resolve().parts[-2:])
