"""What a user reads of a study: tables for the terminal and for `study.md`, `study.csv`, `study.json`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from defeat_cli.ablation.choice import BASELINE, short, shown
from defeat_cli.ablation.power import MOST, POWER, seeds_needed
from defeat_cli.ablation.rows import (
    APS,
    BACKGROUND,
    COSTS,
    MEASURES,
    SECONDS,
    Outcome,
    Row,
    Sweep,
    at_equal_recall,
    main_rows,
    sweeps,
    teacher_ap,
)
from defeat_cli.ablation.statistics import Measured
from defeat_cli.config.variants import Variant
from defeat_cli.console import console, show
from defeat_cli.files import replacing, write_json
from defeat_cli.tables import Sheet
from defeat_cli.text import listed


@dataclass(frozen=True)
class Report:
    """title: of the study; variants: by name; rows: one a variant; notes: what is to be said of how it was made;
    against: the variant that differences are to."""

    title: str
    variants: dict[str, Variant]
    outcomes: Sequence[Outcome]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    against: str = BASELINE

    @property
    def sweeps(self) -> list[Sweep]:
        return sweeps(self.variants, self.rows)

    @property
    def main_rows(self) -> list[Row]:
        return main_rows(self.variants, self.rows, self.against)

    def sheets(self) -> list[Sheet]:
        """All tables, none wider than 80 columns save by long names."""
        rows, against = self.main_rows, self.against
        found = [_main_sheet(rows, against), _seeds_sheet(rows, against), _figures_sheet(rows)]
        found += [_background_sheet(rows, against), *_equal_recall_sheets(rows, self.outcomes, against)]
        found.append(_errors_sheet(rows))
        return [sheet for sheet in [*found, *self.sweep_sheets()] if sheet.cells]

    def sweep_sheets(self) -> list[Sheet]:
        """A table of each sweep's values."""
        return [_sweep_sheet(sweep, self.against) for sweep in self.sweeps]

    def show(self) -> None:
        """Print the tables and how to read them."""
        for sheet in self.sheets():
            show(sheet)
        console.print(escape(self.legend()), soft_wrap=True)

    def legend(self) -> str:
        """How to read the tables."""
        seeds = sorted({outcome.seed for outcome in self.outcomes})
        parts = [
            "AP in percent, at the last epoch; 'at best' is at the epoch with the best AP, chosen on the same images"
        ]
        over = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
        parts.append(over if len(seeds) > 1 else f"seed {seeds[0]} alone")
        if len(seeds) > 2:
            parts.append("Δ is paired by seed, with its 95% confidence interval; * where that leaves out 0")
            parts.append("the seeds needed are those of a paired t-test at 5%, were Δ and its sd what they are here")
        if any(sweep.best for sweep in self.sweeps):
            parts.append("of a sweep the best value stands in the other tables, chosen by its AP on the same images")
        found = (o.evaluations[-1].get("errors") for o in self.outcomes if o.results)
        errors = next((errors for errors in found if errors), None)
        if errors:
            parts.append(
                f"background false positives are from score {errors['background_false_positives']['score']} on"
            )
        teacher = teacher_ap(self.outcomes)
        if teacher is not None:
            parts.append(f"the teacher has AP {100 * teacher:.1f}")
        return "; ".join([*parts, *self.notes]) + "."

    def write(self, folder: Path) -> None:
        """Write study.csv, study.json and study.md."""
        self._write_csv(folder / "study.csv")
        write_json(folder / "study.json", self._content())
        with replacing(folder / "study.md") as temporary:
            temporary.write_text(self._markdown(), encoding="utf-8")

    def _content(self) -> dict[str, Any]:
        """All rows, the sweeps, and under `runs` where each run stands."""
        return {
            "teacher_AP": teacher_ap(self.outcomes),
            "against": self.against,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
            "sweeps": [
                {
                    "variant": sweep.base,
                    "points": [{"variant": row.variant, "settings": point.settings} for point, row in sweep.points],
                    "best": sweep.best and sweep.best.variant,
                }
                for sweep in self.sweeps
            ],
            "runs": [
                {"variant": o.variant, "seed": o.seed, "epoch": max(o.curve, default=0), "finished": bool(o.results)}
                for o in self.outcomes
            ],
        }

    def _write_csv(self, path: Path) -> None:
        """One line per variant; fractions 0-1, empty where there is no value."""
        columns = [f"{name}_{of}" for name in MEASURES for of in ("mean", "std", "delta", "delta_low", "delta_high")]
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["variant", "against", "seeds", *columns], restval="")
            writer.writeheader()
            for row in self.rows:
                line: dict[str, Any] = {"variant": row.variant, "against": self.against, "seeds": row.finished}
                for name, entry in row.measured.items():
                    line |= {f"{name}_mean": entry.mean, f"{name}_std": entry.deviation}
                    if entry.delta is not None:
                        line |= {f"{name}_delta": entry.delta.mean}
                        line |= {f"{name}_delta_low": entry.delta.low, f"{name}_delta_high": entry.delta.high}
                writer.writerow(line)

    def _markdown(self) -> str:
        """The tables, how to read them, and what each variant is."""
        main, *others = self.sheets()
        parts = [f"# {self.title}", self.legend(), main.markdown(), "![AP of each variant](study.png)"]
        parts += [f"{sheet.title}:\n\n{sheet.markdown()}" for sheet in others]
        if self.sweeps:
            parts.append("![AP over the values of each sweep](sweeps.png)")
        parts.append("\n".join(f"- `{row.variant}`: {self.variants[row.variant].summary}" for row in self.main_rows))
        return "\n\n".join(parts) + "\n"


def _main_sheet(rows: Sequence[Row], against: str) -> Sheet:
    header = ["variant", "AP", f"Δ AP to {against}", "at best", "time"]
    cells = [[row.variant, *ap_cells(row), _cell(row, "best_AP"), duration(row.measured.get(SECONDS))] for row in rows]
    if any(row.finished < row.runs for row in rows):
        header.append("runs")
        cells = [[*line, f"{row.finished} of {row.runs}"] for line, row in zip(cells, rows, strict=True)]
    return Sheet("AP and training time", header, cells)


def _seeds_sheet(rows: Sequence[Row], against: str) -> Sheet:
    """What a study would need that means to show the differences that this one found."""
    cells = []
    for row in rows:
        delta = row.measured["AP"].delta if "AP" in row.measured else None
        if delta is not None and delta.deviation is not None:
            needed = seeds_needed(delta.mean, delta.deviation)
            cells.append(
                [
                    row.variant,
                    difference(row.measured["AP"], 100, 1),
                    f"{100 * delta.deviation:.1f}",
                    f"over {MOST}" if needed is None else str(needed),
                ]
            )
    title = f"Seeds needed to see such a difference with a chance of {POWER:.0%}"
    return Sheet(title, ["variant", f"Δ AP to {against}", "its sd", "seeds"], cells)


def _figures_sheet(rows: Sequence[Row]) -> Sheet:
    """Figures that no run has are left out."""
    figures = [name for name in APS[1:] if any(name in row.measured for row in rows)]
    cells = [[row.variant, *(_cell(row, name) for name in figures)] for row in rows if row.finished]
    return Sheet("AP at IoU 0.5 and 0.75, and of small, medium and large objects", ["variant", *figures], cells)


def _background_sheet(rows: Sequence[Row], against: str) -> Sheet:
    measured = [(row.variant, row.measured[BACKGROUND]) for row in rows if BACKGROUND in row.measured]
    cells = [[name, _spread(entry, 1, 0), difference(entry, 1, 0)] for name, entry in measured]
    return Sheet("Background false positives at one score", ["variant", "number", f"Δ to {against}"], cells)


def _equal_recall_sheets(rows: Sequence[Row], outcomes: Sequence[Outcome], against: str) -> list[Sheet]:
    names = {row.variant for row in rows}
    sheets = []
    shown_runs = [outcome for outcome in outcomes if outcome.variant in names]
    for recall, entries in at_equal_recall(shown_runs, against).items():
        found = [(row.variant, entries[row.variant]) for row in rows if row.variant in entries]
        cells = [[name, _spread(entry, 1, 0), difference(entry, 1, 0)] for name, entry in found]
        title = f"Background false positives at an equal recall, of {recall:.0%} of the objects"
        sheets.append(Sheet(title, ["variant", "number", f"Δ to {against}"], cells))
    return sheets


def _errors_sheet(rows: Sequence[Row]) -> Sheet:
    header = ["variant", "class", "location", "both", "duplicate", "background", "missed"]
    measured = [row for row in rows if COSTS[0] in row.measured]
    cells = [[row.variant, *(f"{100 * row.measured[name].mean:.1f}" for name in COSTS)] for row in measured]
    return Sheet("AP50 that each type of error costs (TIDE)", header, cells)


def _sweep_sheet(sweep: Sweep, against: str) -> Sheet:
    """Values that are not trained to the end show the AP that they have so far."""
    cells = []
    for point, row in sweep.points:
        line = [shown(value) for value in point.settings.values()]
        line += ap_cells(row) if row.finished else [_spread(row.ap, 100, 1), "-"]
        cells.append([*line, _cell(row, "best_AP"), str(row.epoch), "best" if row is sweep.best else ""])
    keys = [short(key) for key in sweep.keys]
    if len(set(keys)) < len(keys):
        keys = list(sweep.keys)
    header = [*keys, "AP", f"Δ AP to {against}", "at best", "epochs", ""]
    return Sheet(f"{sweep.base} over {listed(sweep.keys)}", header, cells)


def ap_cells(row: Row) -> list[str]:
    return [_cell(row, "AP"), difference(row.measured.get("AP"), 100, 1)]


def _cell(row: Row, name: str) -> str:
    return _spread(row.measured.get(name), 100, 1)


def _spread(entry: Measured | None, scale: float, digits: int) -> str:
    if entry is None:
        return "-"
    deviation = f" ± {scale * entry.deviation:.{digits}f}" if entry.deviation is not None else ""
    return f"{scale * entry.mean:.{digits}f}{deviation}"


def difference(entry: Measured | None, scale: float, digits: int) -> str:
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


def duration(entry: Measured | None) -> str:
    if entry is None:
        return "-"
    minutes, seconds = divmod(round(entry.mean), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
