"""Commands that several processes work on together: who speaks, and how one process becomes several."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from defeat_cli.console import console, errors
from defeat_cli.engine.distributed import World, joined
from defeat_cli.errors import Interrupted


@contextmanager
def working_together() -> Iterator[World]:
    """The world that this process is part of; all but its main process are silent within, save for errors."""
    with joined() as world:
        console.quiet = not world.is_main
        with warnings.catch_warnings():
            if not world.is_main:
                warnings.simplefilter("ignore")
            try:
                yield world
            except Interrupted:
                errors.quiet = not world.is_main
                raise
