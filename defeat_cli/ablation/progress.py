"""How far a study is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from defeat_cli.console import console


class StudyProgress:
    """A bar over the whole study and one for each run under way; plain lines where the output is not a terminal.

    Args:
        steps: training steps of each run, by name.
        step: how many of them a run has taken so far.
        done: names of the runs that are finished already.
    """

    def __init__(self, steps: dict[str, int], step: Callable[[str], int], done: set[str], quiet: bool = False) -> None:
        self.steps, self.step, self.quiet = steps, step, quiet
        self.taken = {name: steps[name] if name in done else step(name) for name in steps}
        self.ended = set(done)
        self.at_start = sum(self.taken.values())
        self.began = time.monotonic()
        self.tasks: dict[str, TaskID] = {}
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> StudyProgress:
        self.bars.start()
        self.whole = self.bars.add_task("[bold]study", total=sum(self.steps.values()), status="")
        self.polled()
        if not self.quiet:
            begun = f", {len(self.ended)} of them finished" if self.ended else ""
            self.bars.console.print(f"study: {len(self.steps)} runs{begun}")
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
        self.ended.add(name)
        if not self.quiet:
            self.bars.console.print(
                f"[{len(self.ended)}/{len(self.steps)}] {escape(name)}: {summary}{self._rest()}", soft_wrap=True
            )

    def polled(self) -> None:
        """Look at the runs under way."""
        for name, task in self.tasks.items():
            self.taken[name] = self.step(name)
            self.bars.update(task, completed=self.taken[name], status=f"step {self.taken[name]}/{self.steps[name]}")
        runs = f"{len(self.ended)}/{len(self.steps)} runs"
        self.bars.update(self.whole, completed=sum(self.taken.values()), status=runs + self._rest())

    def _rest(self) -> str:
        """`, 1:02:03 to go`, once there is something to judge by."""
        done = sum(self.taken.values()) - self.at_start
        rest = sum(self.steps.values()) - sum(self.taken.values())
        if done <= 0 or rest <= 0:
            return ""
        seconds = round((time.monotonic() - self.began) * rest / done)
        return f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} to go"
