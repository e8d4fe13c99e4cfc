"""How far a study is, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from defeat_cli.console import console
from defeat_cli.text import counted


class StudyProgress:
    """A bar over all runs and one for each run under way; plain lines where the output is not a terminal.

    Args:
        steps: training steps of each run, by name.
        step: how many of them a run has taken so far.
        done: how many further runs are at their end already.
    """

    def __init__(self, steps: Mapping[str, int], step: Callable[[str], int], done: int, quiet: bool = False) -> None:
        self.steps, self.step, self.quiet = steps, step, quiet
        self.taken = {name: step(name) for name in steps}
        self.runs, self.ended = len(steps) + done, done
        self.tasks: dict[str, TaskID] = {}
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
            speed_estimate_period=3600,
        )

    def __enter__(self) -> StudyProgress:
        self.bars.start()
        taken = sum(self.taken.values())
        self.whole = self.bars.add_task("[bold]study", total=sum(self.steps.values()), completed=taken, status="")
        self._say(f"study: {len(self.steps)} of {counted(self.runs, 'run')} to train")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bars.stop()

    def started(self, name: str) -> None:
        """A run's process was started."""
        self.tasks[name] = self.bars.add_task(escape(name), total=self.steps[name], status="")

    def finished(self, name: str, summary: str) -> None:
        """A run is over, well or not."""
        self.bars.remove_task(self.tasks.pop(name))
        self.taken[name] = self.steps[name]
        self.ended += 1
        self.polled()
        self._say(f"[{self.ended}/{self.runs}] {name}: {summary}{self._rest()}")

    def polled(self) -> None:
        """Look at the runs under way."""
        for name, task in self.tasks.items():
            self.taken[name] = self.step(name)
            self.bars.update(task, completed=self.taken[name])
        self.bars.update(self.whole, completed=sum(self.taken.values()))
        self.bars.update(self.whole, status=f", {self.ended}/{counted(self.runs, 'run')}{self._rest()}")

    def warn(self, text: str) -> None:
        """One line that deserves attention."""
        self.bars.console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def _rest(self) -> str:
        """`, 1:02:03 to go`, once there is something to judge by."""
        seconds = next(task for task in self.bars.tasks if task.id == self.whole).time_remaining
        return f", {timedelta(seconds=round(seconds))} to go" if seconds else ""

    def _say(self, text: str) -> None:
        if not self.quiet:
            self.bars.console.print(escape(text), soft_wrap=True)
