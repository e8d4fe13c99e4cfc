"""`sweeps.png`: AP over the values of each sweep, with its spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from defeat_cli.ablation.choice import BASELINE, short, shown
from defeat_cli.ablation.picture import BLUE, GREY, INK, finish
from defeat_cli.ablation.rows import Row, Sweep
from defeat_cli.ablation.statistics import Measured
from defeat_cli.files import replacing

STYLES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
"""Lines of a grid are told apart by these as well as by their colours."""


def draw_sweeps(sweeps: Sequence[Sweep], baseline: Measured | None, path: Path, against: str = BASELINE) -> None:
    """A panel for each sweep; of a grid a line for each combination of the settings but the last.

    Args:
        baseline: AP of the variant `against`, drawn behind them.
    """
    columns = min(2, len(sweeps))
    lines = math.ceil(len(sweeps) / columns)
    figure = Figure(figsize=(max(6.0, 5.0 * columns), 0.5 + 3.6 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, sweep in zip(panels, sweeps, strict=False):
        _draw_sweep(panel, sweep, baseline)
    for panel in panels[len(sweeps) :]:
        panel.set_visible(False)
    title = f"AP, %: mean ± 1 standard deviation\n(grey: {against}; hollow: stopped at that epoch)"
    figure.suptitle(title, fontsize=9, color=INK)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def _draw_sweep(axes: Axes, sweep: Sweep, baseline: Measured | None) -> None:
    if baseline is not None:
        spread = baseline.deviation or 0.0
        axes.axhspan(100 * (baseline.mean - spread), 100 * (baseline.mean + spread), color=GREY, alpha=0.2, lw=0)
        axes.axhline(100 * baseline.mean, color=GREY, lw=1, ls="--")
    place = _places(axes, [point.settings[sweep.keys[-1]] for point, _ in sweep.points])
    lines: dict[str, list[tuple[float, Row]]] = {}
    for point, row in sweep.points:
        *others, last = point.settings.values()
        name = ", ".join(f"{short(key)}={shown(value)}" for key, value in zip(sweep.keys, others, strict=False))
        lines.setdefault(name, []).append((place[shown(last)], row))
    for i, (name, points) in enumerate(lines.items()):
        _draw_line(axes, points, name, BLUE if len(lines) == 1 else f"C{i}", *STYLES[i % len(STYLES)])
    if len(lines) > 1:
        axes.legend(fontsize=7)
    axes.set_title(sweep.base if sweep.best is None else f"best: {sweep.best.variant}", fontsize=9, color=INK)
    finish(axes, sweep.keys[-1], grid="y")


def _draw_line(axes: Axes, points: list[tuple[float, Row]], name: str, color: str, marker: str, style: str) -> None:
    """Values that are trained to the end on a line with their spread, the others alone with their epoch."""
    whole = [(x, row.measured["AP"]) for x, row in points if "AP" in row.measured]
    bars = [100 * (entry.deviation or 0.0) for _, entry in whole]
    heights = [100 * entry.mean for _, entry in whole]
    axes.errorbar([x for x, _ in whole], heights, bars, marker=marker, ls=style, capsize=3, color=color, label=name)
    for x, row in points:
        if "AP" not in row.measured and row.ap is not None:
            y = 100 * row.ap.mean
            axes.plot(x, y, marker, mfc="none", mec=color)
            axes.annotate(f"epoch {row.epoch}", (x, y), (5, 4), textcoords="offset points", fontsize=7)


def _places(axes: Axes, values: list[Any]) -> dict[str, float]:
    """Where each value stands: numbers by size, on a logarithmic axis where they span a decade; words side by side."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        places = {shown(value): float(value) for value in values}
        above = [place for place in places.values() if place > 0]
        if above and min(places.values()) >= 0 and max(above) >= 10 * min(above):
            axes.set_xscale("symlog", linthresh=min(above))
    else:
        places = {name: float(i) for i, name in enumerate(dict.fromkeys(map(shown, values)))}
    axes.set_xticks(list(places.values()), list(places))
    axes.minorticks_off()
    return places
