"""What a study found: a row per variant from the results of its runs, as tables, `study.csv`, `.json` and `.md`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from defeat_cli.ablation.statistics import Delta, deviation, mean, paired_delta
from defeat_cli.config.schema import nearest
from defeat_cli.engine.detection_errors import ERROR_TYPES
from defeat_cli.engine.runs import RunFolder, write_json
from defeat_cli.errors import RunError
from defeat_cli.files import replacing

BASELINE = "none"
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
BACKGROUND, SECONDS = "background_false_positives", "training_seconds"
COSTS = tuple(f"dap_{name}" for name in ERROR_TYPES)
MEASURES = (*FIGURES, BACKGROUND, *COSTS, SECONDS)
"""Everything that is averaged over seeds. AP and dAP are fractions 0-1, dAP being the AP50 that an error type costs."""

ERRORS_TITLE = (
    "Background false positives, and the AP50 that each type of error costs "
    "(TIDE: classification, localisation, both, duplicate, background, missed)"
)
ERRORS_HEADER = ["variant", "bg false pos.", "Δ to none", "cls", "loc", "both", "dup", "bg", "miss"]
SORT_KEYS = (*FIGURES, "background", "time", "given")
"""What a table can be sorted by: best first, or `given` for the order in which the variants were named."""


@dataclass(frozen=True)
class Outcome:
    """One run of a study.

    results: results.json, None where the run is not finished.
    curve: (epoch, AP) of each evaluation so far.
    """

    variant: str
    seed: int
    results: dict[str, Any] | None = None
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Measured:
    """One measure of a variant: `values` by seed, their mean and sample deviation, the paired difference to `none`."""

    values: dict[int, float]
    mean: float
    deviation: float | None
    delta: Delta | None


@dataclass(frozen=True)
class Row:
    """One variant. `measured` lacks what no finished run has, e.g. APs where there are no small objects."""

    variant: str
    finished: int
    runs: int
    measured: dict[str, Measured]


def read_outcome(variant: str, seed: int, folder: Path) -> Outcome:
    """What a run folder holds, finished, unfinished or not begun."""
    run = RunFolder(folder)
    curve = tuple((entry["epoch"], entry["AP"]) for entry in run.metrics() if entry["kind"] == "eval")
    return Outcome(variant, seed, run.results() if run.finished else None, curve)


def measures(results: dict[str, Any]) -> dict[str, float]:
    """The measures of one run's results.json; what had nothing to score (-1 there) is left out."""
    student = results["student"]
    values = {name: student[name] for name in FIGURES if student[name] >= 0}
    if "errors" in student:
        values[BACKGROUND] = student["errors"]["background_false_positives"]["count"]
        values |= {f"dap_{name}": student["errors"]["types"][name]["dap"] for name in ERROR_TYPES}
    values[SECONDS] = results["training_seconds"]
    return values


def summarize(outcomes: Iterable[Outcome], sort: str = "AP") -> list[Row]:
    """One row per variant, sorted; variants without a finished run come last.

    Raises:
        RunError: no such sort key.
    """
    check_sort(sort)
    runs: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        runs.setdefault(outcome.variant, []).append(outcome)
    values = {variant: _by_measure(group) for variant, group in runs.items()}
    baseline = values.get(BASELINE, {})
    rows = []
    for variant, group in runs.items():
        measured = {
            name: Measured(
                by_seed,
                mean(list(by_seed.values())),
                deviation(list(by_seed.values())),
                paired_delta(by_seed, baseline.get(name, {})) if variant != BASELINE else None,
            )
            for name, by_seed in values[variant].items()
        }
        rows.append(Row(variant, sum(run.results is not None for run in group), len(group), measured))
    return rows if sort == "given" else sorted(rows, key=_sort_key(sort))


def check_sort(sort: str) -> None:
    """Refuse an unknown sort key, naming the nearest."""
    if sort not in SORT_KEYS:
        raise RunError(f"cannot sort by {sort!r}{nearest(sort, SORT_KEYS)}. Known: {', '.join(SORT_KEYS)}")


def _sort_key(sort: str) -> Callable[[Row], tuple[bool, float]]:
    measure, sign = {"background": (BACKGROUND, 1), "time": (SECONDS, 1)}.get(sort, (sort, -1))

    def key(row: Row) -> tuple[bool, float]:
        entry = row.measured.get(measure)
        return entry is None, sign * entry.mean if entry else 0.0

    return key


def _by_measure(runs: list[Outcome]) -> dict[str, dict[int, float]]:
    """Measure -> seed -> value, over the finished runs of one variant."""
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        if run.results is not None:
            for name, value in measures(run.results).items():
                values.setdefault(name, {})[run.seed] = value
    return values


def teacher_ap(outcomes: Iterable[Outcome]) -> float | None:
    """The teacher's AP, which each run with a teacher reports."""
    return next((o.results["teacher"]["AP"] for o in outcomes if o.results and o.results.get("teacher")), None)


# The tables. Cells are made once, for the terminal and for study.md.


def main_cells(rows: list[Row], narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and cells: AP and its Δ, the other figures, training time. Figures that no run has are left out.

    Args:
        narrow: leave out the standard deviations of the other figures.
    """
    figures = [name for name in FIGURES[1:] if any(name in row.measured for row in rows)]
    unfinished = any(row.finished < row.runs for row in rows)
    cells = []
    for row in rows:
        ap = row.measured.get("AP")
        line = [row.variant, _percent(ap), _difference(ap, 100, 1)]
        line += [_percent(row.measured.get(name), spread=not narrow) for name in figures]
        line.append(_duration(row.measured.get(SECONDS)))
        cells.append([*line, f"{row.finished} of {row.runs}"] if unfinished else line)
    header = ["variant", "AP", "Δ AP to none", *figures, "time"]
    return [*header, "runs"] if unfinished else header, cells


def error_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: background false positives, and the AP50 that each type of error costs. No cells where no run
    has an error report."""
    cells = []
    for row in rows:
        background = row.measured.get(BACKGROUND)
        if background is not None:
            line = [row.variant, _count(background), _difference(background, 1, 0)]
            cells.append([*line, *(_percent(row.measured[name], spread=False) for name in COSTS)])
    return ERRORS_HEADER, cells


def tables(rows: list[Row], title: str, console: Console) -> list[Table]:
    """What a user sees; standard deviations are left out where they do not fit."""
    main = _table(*main_cells(rows), title)
    if console.measure(main, options=console.options.update_width(1000)).maximum > console.width:
        main = _table(*main_cells(rows, narrow=True), title)
    header, cells = error_cells(rows)
    return [main, _table(header, cells, ERRORS_TITLE)] if cells else [main]


def _table(header: list[str], cells: list[list[str]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i < 3)
    for line in cells:
        table.add_row(*map(escape, line), style="dim" if line[0] == BASELINE else "")
    return table


def _percent(entry: Measured | None, spread: bool = True) -> str:
    if entry is None:
        return "-"
    deviation = f" ± {100 * entry.deviation:.1f}" if spread and entry.deviation is not None else ""
    return f"{100 * entry.mean:.1f}{deviation}"


def _difference(entry: Measured | None, scale: float, digits: int) -> str:
    """Δ with its interval, and a star where that leaves out 0."""
    if entry is None or entry.delta is None:
        return "-"
    delta = entry.delta
    # Adding 0 makes -0 positive.
    numbers = [
        format(round(scale * value, digits) + 0.0, f"+.{digits}f")
        for value in (delta.mean, delta.low, delta.high)
        if value is not None
    ]
    if len(numbers) == 1:
        return numbers[0]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]{'*' if delta.clear else ' '}"


def _count(entry: Measured | None) -> str:
    if entry is None:
        return "-"
    return f"{entry.mean:.0f}" + (f" ± {entry.deviation:.0f}" if entry.deviation is not None else "")


def _duration(entry: Measured | None) -> str:
    if entry is None:
        return "-"
    minutes, seconds = divmod(round(entry.mean), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def legend(outcomes: list[Outcome]) -> str:
    """How to read the tables."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    parts = ["AP in percent, at the best epoch"]
    if len(seeds) > 1:
        parts[0] += f", mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    else:
        parts[0] += f", seed {seeds[0]} alone"
    if len(seeds) > 2:
        parts.append("Δ is paired by seed, with its 95% confidence interval; * where that leaves out 0")
    score = next(
        (o.results["student"]["errors"] for o in outcomes if o.results and "errors" in o.results["student"]), None
    )
    if score:
        parts.append(
            f"background false positives are counted from score {score['background_false_positives']['score']}"
        )
    teacher = teacher_ap(outcomes)
    if teacher is not None:
        parts.append(f"the teacher has AP {100 * teacher:.1f}")
    return "; ".join(parts) + "."


# The files.


def write_json_report(outcomes: list[Outcome], rows: list[Row], path: Path) -> None:
    """All rows, and under `runs` where each run stands."""
    content = {
        "teacher_AP": teacher_ap(outcomes),
        "rows": [asdict(row) for row in rows],
        "runs": [{"variant": o.variant, "seed": o.seed, "finished": o.results is not None} for o in outcomes],
    }
    write_json(path, content)


def write_csv(rows: list[Row], path: Path) -> None:
    """One line per variant; fractions 0-1, empty where there is no value."""
    columns = ["variant", "seeds"]
    for name in MEASURES:
        columns += [f"{name}_mean", f"{name}_std", f"{name}_delta", f"{name}_delta_low", f"{name}_delta_high"]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            line: dict[str, Any] = {"variant": row.variant, "seeds": row.finished}
            for name, entry in row.measured.items():
                line |= {f"{name}_mean": entry.mean, f"{name}_std": entry.deviation}
                if entry.delta is not None:
                    line |= {f"{name}_delta": entry.delta.mean}
                    line |= {f"{name}_delta_low": entry.delta.low, f"{name}_delta_high": entry.delta.high}
            writer.writerow(line)


def write_markdown(outcomes: list[Outcome], rows: list[Row], title: str, summaries: dict[str, str], path: Path) -> None:
    """The tables, how to read them, and what each variant is."""
    parts = [f"# {title}", legend(outcomes), _markdown_table(*main_cells(rows))]
    header, cells = error_cells(rows)
    if cells:
        parts += [f"{ERRORS_TITLE}:", _markdown_table(header, cells)]
    parts += ["![AP of each variant](study.png)"]
    parts.append("\n".join(f"- `{row.variant}`: {summaries[row.variant]}" for row in rows))
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _markdown_table(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
    return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines)
