"""When the state of a training is saved, and that nothing which ends a run, or keeps it from saving, loses more."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.faults import BadStepError
from defeat_cli.engine.runs import BEST, LAST, RunFolder
from defeat_cli.engine.stopping import Asked
from defeat_cli.errors import Ended, RunError

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Saver:
    """Saves a training as it goes: each `every`, and whenever the run ends before its time.

    What the system refuses to write, as where the disk is full, is said and does not end the training: the checkpoint
    before it stays.

    Args:
        every: steps, or a time such as `30m`; the recipe's `run.save_every`.
        write: writes a checkpoint of the training under a name in the run folder, with metrics where it was evaluated.
        reporter: says what could not be saved; see `console.Reporter`.
        world: the processes that train together. `last` and `best` are for all of them, and only the main one writes.
            An error of one of several saves nothing, as the others are within a step that it no longer takes part in;
            save for a step that all of them give up.
    """

    def __init__(
        self,
        training: Training,
        run: RunFolder,
        every: int | str,
        write: Callable[[Training, str, dict[str, Any]], None],
        reporter: Any,
        world: World = ALONE,
    ) -> None:
        self.training, self.run, self.write, self.reporter, self.world = training, run, write, reporter, world
        self.steps = every if isinstance(every, int) else None
        self.seconds = None if isinstance(every, int) else int(every[:-1]) * SECONDS[every[-1]]
        self.metrics: dict[str, Any] = {}
        self.tried_at = time.monotonic()
        self.saved_step = training.step
        self.broken = False
        self.log_refused = False

    @property
    def due(self) -> bool:
        """Whether it is time to save again, asked after each step."""
        if self.steps is not None:
            return self.training.step % self.steps == 0
        return time.monotonic() - self.tried_at >= self.seconds

    @property
    def standing(self) -> str:
        """What of this run is on the disk, as a sentence for whoever ends it."""
        if self.saved_step == self.training.step:
            return f"{self.run.path}: step {self.saved_step} is saved; --resume goes on from there"
        kept = f"step {self.saved_step} is" if self.saved_step else "nothing is"
        return (
            f"{self.run.path}: step {self.training.step} could not be saved, {kept} on the disk; --resume goes on there"
        )

    def last(self) -> bool:
        """Save all that is needed to go on; whether that worked."""
        self.tried_at = time.monotonic()
        self.log()
        saved = self._written(LAST)
        if saved:
            self.saved_step = self.training.step
        return saved

    def best(self) -> bool:
        """Save the student as the best so far; whether that worked."""
        return self._written(BEST)

    def log(self, entry: dict[str, Any] | None = None) -> None:
        """Append a line to the run's metrics; with None only those that were refused before."""
        if not self.world.is_main:
            return
        try:
            self.run.log(*([] if entry is None else [entry]))
            self.log_refused = False
        except OSError as error:
            if not self.log_refused:
                self.reporter.warn(f"{_told(error)}; lines of the log are kept until they can be written")
            self.log_refused = True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step, which undoes itself where it fails, and its accounting."""
        self.moved = False
        try:
            yield
        except BaseException:
            # Parameters have moved, or partly so: there is no way back to a whole step.
            self.broken = self.moved
            raise

    @contextmanager
    def ending(self, stop: Asked) -> Iterator[None]:
        """Around the whole training: whatever ends it by an error, the last whole step is saved first.

        Args:
            stop: whether the run was asked to stop; an error is then what became of it elsewhere.

        Raises:
            Interrupted: an error came after the run was asked to stop.
            RunError: a loader process died.
        """
        watch = self.training.optimizer.register_step_pre_hook(self._parameters_move)
        try:
            yield
        except Exception as error:
            self._rescue(error)
            if stop():
                raise stop.interrupted(self.standing) from error
            if isinstance(error, RuntimeError) and (death := re.search(r"DataLoader worker.*", str(error))):
                raise RunError(
                    f"a process that loads images died ({death[0]}): was there too little memory? data.workers sets "
                    "how many there are"
                ) from error
            raise
        finally:
            watch.remove()

    def _parameters_move(self, *_: Any) -> None:
        self.moved = True

    def _rescue(self, error: Exception) -> None:
        alone = self.world.size > 1 and not isinstance(error, BadStepError | Ended)
        if self.saved_step == self.training.step or alone:
            return
        if self.broken:
            saved = f"step {self.saved_step} is what is saved" if self.saved_step else "nothing is saved"
            self.reporter.warn(f"{self.run.path}: the run ended in the middle of a step, and {saved}")
            return
        try:
            self.last()
        except Exception as second:  # the first error is the one to be told
            self.reporter.warn(f"{self.run.path}: the state could not be saved: {second}")
        else:
            self.reporter.warn(self.standing)

    def _written(self, name: str) -> bool:
        written = True
        try:
            self.write(self.training, name, self.metrics)
        except OSError as error:
            self.reporter.warn(
                f"{_told(error)}. {name} is not saved; training goes on, and what was saved before stays"
            )
            written = False
        return self.world.on_all(written)


def _told(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
