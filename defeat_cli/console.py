"""What a user sees in the terminal: progress, notes and tables. Plain lines where the output is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from defeat_cli.tables import Sheet
from defeat_cli.text import counted, spoken_duration

# No emoji: `:x:` in a path or a class name is to stay what it is.
console = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)


class Reporter:
    """Shows one training as it goes.

    Args:
        title: what is trained, e.g. `student`.
        quiet: say nothing but warnings.
    """

    def __init__(self, title: str, quiet: bool = False) -> None:
        self.title = title
        self.quiet = quiet
        self.live = console.is_terminal and not quiet
        self.epochs = self.steps = 0
        self.estimated = False
        self.status = ""
        self.progress: Progress | None = None

    def note(self, text: str) -> None:
        """One line of plain information."""
        if not self.quiet:
            console.print(escape(text), soft_wrap=True)

    def doing(self, text: str) -> None:
        """What is being done now and may take a while, e.g. `reading my_data`."""
        self.note(f"{text} …")

    def warn(self, text: str) -> None:
        """One line that deserves attention."""
        console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def begin(self, step: int, steps: int, epochs: int, rate: str) -> None:
        """Training starts, or goes on, at `step` of `steps`; rate: its learning rate in words."""
        self.steps, self.epochs = steps, epochs
        begun = f", from step {step:,}" if step else ""
        self.note(f"{self.title}: {counted(epochs, 'epoch')}, {counted(steps, 'step')}{begun}, {rate}")
        if self.live:
            # The bar takes what the others leave, and all terms stand below, on as many lines as they need.
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("left{task.fields[status]}"),
                expand=True,
            )
            self.task = self.progress.add_task(self.title, total=steps, completed=step, status="")
            self.terms = Text(overflow="fold", style="dim")
            self.display = Live(Group(self.progress, self.terms), console=console, transient=True)
            self.display.start()

    def paced(self, seconds: float, steps: int) -> None:
        """A step takes so many seconds, by what was measured last, and so many steps are to come."""
        each = f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"
        estimate = "estimated anew" if self.estimated else "an estimate"
        self.estimated = True
        left = spoken_duration(seconds * steps)
        self.note(f"{self.title}: about {left} to go, {estimate} at {each} a step; evaluations add to it")

    def stepped(self, step: int) -> None:
        """A step is done."""
        if self.progress:
            epoch = min(self.epochs, 1 + (step - 1) * self.epochs // max(1, self.steps))
            description = f"{self.title} epoch {epoch}/{self.epochs}"
            self.progress.update(self.task, completed=step, description=description, status=self.status)

    def logged(self, entry: dict[str, Any]) -> None:
        """A training line went into metrics.jsonl."""
        losses = " ".join(f"{short_name(name)} {value:.3f}" for name, value in entry["weighted"].items())
        losses = f"loss {entry['loss']:.3f}: {losses}"
        seen = f" ({spoken_counts(entry['seen'])} images)" if "seen" in entry else ""
        speed = f"{entry['images_per_second']:.1f} img/s"
        if self.progress:
            self.status = f", {speed}"
            self.terms.plain = f"{losses}{seen}"
        elif not self.quiet:
            place = f"epoch {entry['epoch']}/{self.epochs} step {entry['step']}/{self.steps}"
            console.print(f"{self.title} {place}{seen} {speed} {losses}", soft_wrap=True)

    def left_out(self, step: int, reason: str) -> None:
        """A step changed nothing, because its `loss` or `gradient` was not finite, or by an `overflow`."""
        if reason != "overflow":
            self.warn(f"step {step} is left out: its {reason} is not finite")
        else:
            self.note(f"step {step} is left out: its gradients overflowed, and the loss scale is lowered")

    def evaluated(self, epoch: float, metrics: dict[str, Any]) -> None:
        """A student was evaluated; the epoch is a fraction in the midst of one."""
        if not self.quiet:
            console.print(
                f"{self.title} epoch {epoch}/{self.epochs}: [bold]AP {percent(metrics['AP'])}[/] "
                f"AP50 {percent(metrics['AP50'])} AP75 {percent(metrics['AP75'])}"
            )

    @contextmanager
    def evaluating(self, images: int) -> Iterator[Callable[[int], None]]:
        """Shows an evaluation of `images` images; yields what to call with the number of images done."""
        if self.progress:
            task = self.progress.add_task("  evaluating", total=images, status="")
            try:
                yield lambda done: self.progress.advance(task, done)
            finally:
                self.progress.remove_task(task)
        else:
            with counting("evaluating", images, self.quiet) as advance:
                yield advance

    def end(self) -> None:
        """Training is over, however it ended."""
        if self.progress:
            self.display.stop()
            self.progress = None


@contextmanager
def counting(title: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` items in a terminal, nothing elsewhere; yields what to call with the number done."""
    if quiet or not console.is_terminal:
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


SHORT = {
    "loss_classifier": "cls",
    "loss_box_reg": "box",
    "loss_objectness": "rpn_cls",
    "loss_rpn_box_reg": "rpn_box",
    "classification": "cls",
    "bbox_regression": "box",
    "bbox_ctrness": "centre",
}


def short_name(term: str) -> str:
    """A loss term's name as the progress line shows it."""
    return SHORT.get(term, term)


def spoken_counts(counts: dict[str, int]) -> str:
    """`120 labelled and 60 unlabelled`."""
    return " and ".join(f"{number} {kind}" for kind, number in counts.items())


def percent(fraction: float) -> str:
    """An AP as people quote it: 0.374 -> `37.4`; `-` where there was nothing to score."""
    return "-" if fraction < 0 else f"{100 * fraction:.1f}"


def bare_table(title: str, *, show_header: bool = True) -> Table:
    """A table without columns yet, in the one look that all tables have: a line below the header and no frame."""
    look = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    return Table(title=title, show_header=show_header, **look)


def new_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    """A table of names and figures. Where it is too wide the names fold; a figure or a header is never cut."""
    table = bare_table(title)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def show(table: Table | Sheet) -> None:
    """Print a table below its title, which rich would fold to the table's width."""
    if isinstance(table, Sheet):
        table = new_table(table.title, table.header, table.cells)
    if table.title:
        console.print(f"[bold]{escape(str(table.title))}[/]", soft_wrap=True)
        table.title = None
    console.print(table, "")


def results_sheet(results: dict[str, Any]) -> Sheet:
    """Teacher, plain and distilled student side by side, with Δ AP to the others, and the time that each takes."""
    names = {"teacher": "teacher", "plain": "plain", "student": "distilled"}
    found = {key: results[key] for key in names if results.get(key)}
    if "teacher" not in found:
        names["student"] = "student"
    figures = [name for name in results["student"] if name.startswith("AP")]
    others = [key for key in ("teacher", "plain") if key in found]
    taken = results.get("ms_per_image", {})
    rows = []
    for key, metrics in found.items():
        row = [names[key], *(percent(metrics.get(name, -1)) for name in figures)]
        for other in others:
            compared = key not in ("teacher", other)
            row.append(f"{100 * (metrics['AP'] - found[other]['AP']):+.1f}" if compared else "")
        if taken:
            row.append(_three_digits(taken[key]) if key in taken else "-")
        rows.append(row)
    title = "COCO mAP on the validation images" + ("; ms: milliseconds an image" if taken else "")
    return Sheet(title, ["", *figures, *(f"Δ {other}" for other in others), *(["ms"] if taken else [])], rows)


def _three_digits(number: float) -> str:
    """`0.123`, `12.3`, `1234`."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def metrics_table(metrics: dict[str, Any], title: str, per_class: bool = False) -> Table:
    """The twelve COCO figures, or one row per class."""
    if per_class:
        return new_table(title, ["class", "AP"], [[name, percent(ap)] for name, ap in metrics["per_class"].items()])
    figures = [[name, percent(value)] for name, value in metrics.items() if isinstance(value, float)]
    return new_table(title, ["figure", "value"], figures)


def errors_table(report: dict[str, Any]) -> Table:
    """Error types with their counts and the AP50 that each costs."""
    found = report["background_false_positives"]
    return new_table(
        f"Errors by TIDE's types; {counted(found['count'], 'background false positive')} at score {found['score']}",
        ["error", "count", "AP50 it costs"],
        [[name, str(entry["count"]), percent(max(0.0, entry["dap"]))] for name, entry in report["types"].items()],
    )
