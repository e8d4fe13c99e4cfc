"""The plain student of a comparison, trained at the same time by a process of its own (`run.plain_beside`).

A network too narrow for several CPU threads takes as long with one as with two, so two trainings at once take hardly
longer than one. The other process is a head start and no more: it trains the very run that would be trained here
afterwards, and what it has not done when this process is ready is done here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from defeat_cli.ablation.processes import LOG, Worker
from defeat_cli.config.schema import Recipe
from defeat_cli.console import Reporter
from defeat_cli.engine.runs import RunFolder
from defeat_cli.text import counted

TITLE = "plain student"


class Beside:
    """A run that another process trains; without `worker` there is none."""

    def __init__(self, run: RunFolder, worker: Worker | None, threads: int, reporter: Reporter) -> None:
        self.run, self.worker, self.threads, self.reporter = run, worker, threads, reporter

    def results(self) -> dict[str, Any] | None:
        """What the run has come to; None where it is not at its end. It is nobody's then, and can be gone on with: with
        its own share of the threads, which is the smaller one of an odd number."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.worker is None:
            return None
        running = self.worker.process.poll() is None
        self.stop()
        if running:
            self.reporter.note(f"{TITLE}: goes on in this process")
        elif self.worker.failure is not None:
            failure = f"{self.worker.failure} (see {self.worker.log})"
            self.reporter.warn(f"{TITLE}: its process failed: {failure}. It goes on in this process")
        return None if running or self.worker.failure is not None else self.run.results()

    def stop(self) -> None:
        """Have the process save its run and end; where waiting for that is interrupted, it is killed."""
        if self.worker is not None and self.worker.process.poll() is None:
            try:
                self.worker.process.terminate()
                self.worker.process.wait()
            finally:
                self.worker.process.kill()
                self.worker.process.wait()


def threads_beside(recipe: Recipe, device: torch.device, processes: int, reporter: Reporter) -> int:
    """How many of this process's CPU threads one beside it gets; 0 where there is to be none.

    Args:
        processes: how many train the run together.
    """
    if not recipe.run.plain_beside:
        return 0
    threads = torch.get_num_threads() // 2 if device.type == "cpu" and processes == 1 else 0
    if threads == 0:
        reporter.note(f"{TITLE}: is trained afterwards; run.plain_beside needs one process with two threads of a CPU")
    return threads


@contextmanager
def beside(
    run: RunFolder, recipe: Recipe | None, threads: int, reporter: Reporter, *, overwrite: bool, lock: int | None
) -> Iterator[Beside]:
    """Within, another process trains a run with some of this one's CPU threads.

    To the end each keeps to its share, as the last bits of a result may depend on the number of threads.

    Args:
        recipe: of the run; None leaves it to this process.
        threads: of the other process; 0 starts none.
        overwrite: a run of another recipe is begun anew.
        lock: what `locking.locked` gave.

    Raises:
        RunError: the folder holds a run of another recipe.
    """
    before, worker = torch.get_num_threads(), None
    torch.set_num_threads(before - threads)
    try:
        # A run that is prolonged is left to this process too: a worker does not know that to go on was asked for.
        if threads and recipe is not None and not (run.exists and run.prolonged_by(recipe)):
            anew = overwrite and run.exists and not run.holds(recipe)
            run.open(recipe, resume=not anew, overwrite=anew)
            # Where both are set, torch heeds the latter.
            environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
            worker = Worker(run.path, command(run.path, recipe.schedule.epochs), environment, lock)
            share = counted(threads, "CPU thread")
            reporter.note(f"{TITLE}: trained beside the {reporter.title}, with {share}; see {run / LOG}")
        other = Beside(run, worker, threads, reporter)
        try:
            yield other
        finally:
            other.stop()
    finally:
        torch.set_num_threads(before)


def command(folder: Path, epoch: int, processes: int = 1, features: Path | None = None) -> list[str]:
    """What trains the run in a folder up to an epoch.

    Args:
        features: folder in which runs keep the teacher's features for each other.
    """
    shared = [str(features)] if features is not None else []
    return [sys.executable, "-m", "defeat_cli.jobs.worker", str(folder), str(epoch), str(processes), *shared]
