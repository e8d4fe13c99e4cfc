"""`study.png`: AP of each variant with its spread, its difference to another, and AP over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from defeat_cli.ablation.choice import BASELINE
from defeat_cli.ablation.rows import Outcome, Row
from defeat_cli.files import replacing

INK, GREY, BLUE = "#222222", "#8c8c8c", "#0072b2"
"""Grey for what others are compared with: told apart by lightness too, whatever colours the reader sees."""


def draw_study(
    outcomes: Sequence[Outcome], rows: Sequence[Row], title: str, path: Path, against: str = BASELINE
) -> None:
    """Draw the rows in their order; those without a finished run are named, and empty.

    Args:
        against: the variant that the rows' differences are to.
    """
    panels = [row.variant for row in rows if row.variant != against] or [against]
    columns = max(2, min(4, math.ceil(math.sqrt(len(panels)))))
    lines = math.ceil(len(panels) / columns)
    height = max(3.2, 1.2 + 0.42 * len(rows), 0.6 + 1.5 * lines)
    figure = Figure(figsize=(8.5 + 1.9 * columns, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    left, right = figure.subfigures(1, 2, width_ratios=[8.5, 0.6 + 1.9 * columns])
    average, difference = left.subplots(1, 2, sharey=True, width_ratios=[1.15, 1])
    _draw_averages(average, rows, against)
    _draw_differences(difference, rows, against)
    _draw_curves(right, outcomes, panels, lines, columns, against)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def _draw_averages(axes: Axes, rows: Sequence[Row], against: str) -> None:
    """Each seed a ring; above them their mean and a standard deviation either way."""
    for place, row in enumerate(rows):
        entry = row.measured.get("AP")
        if entry is None:
            continue
        color = GREY if row.variant == against else BLUE
        if len(entry.values) > 1:
            seeds = [100 * value for value in entry.values.values()]
            axes.plot(seeds, [place + 0.27] * len(seeds), "o", ms=3.5, mfc="none", mec=color)
        spread = 100 * entry.deviation if entry.deviation is not None else None
        axes.errorbar(100 * entry.mean, place, xerr=spread, fmt="o", ms=7, color=color, elinewidth=2.5, alpha=0.9)
        if row.variant == against:
            axes.axvline(100 * entry.mean, color=GREY, lw=1, ls="--", zorder=0)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    finish(axes, "AP, %: mean ± 1 standard deviation\nseeds as rings")


def _draw_differences(axes: Axes, rows: Sequence[Row], against: str) -> None:
    """Mean difference with its interval, where there is one; filled where that leaves out 0."""
    for place, row in enumerate(rows):
        delta = row.measured["AP"].delta if "AP" in row.measured else None
        if delta is not None:
            bar = None if delta.high is None else 100 * (delta.high - delta.mean)
            fill = BLUE if delta.clear else "white"
            axes.errorbar(100 * delta.mean, place, xerr=bar, fmt="o", ms=7, color=BLUE, mfc=fill, elinewidth=2.5)
    axes.axvline(0, color=GREY, lw=1, ls="--", zorder=0)
    axes.tick_params(left=False)
    finish(axes, f"Δ AP to {against}\n95% interval (filled: leaves out 0)")


def _draw_curves(
    figure: Figure, outcomes: Sequence[Outcome], variants: list[str], lines: int, columns: int, against: str
) -> None:
    """A small panel per variant with what it is compared with behind it: mean and range of the seeds."""
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for place, (panel, variant) in enumerate(zip(panels.flat, variants, strict=False)):
        for name, color in reversed({variant: BLUE, against: GREY}.items()):
            _draw_curve(panel, [outcome for outcome in outcomes if outcome.variant == name], color)
        panel.set_title(variant, fontsize=8, color=INK, pad=2)
        finish(panel, "epoch" if place + columns >= len(variants) else "")
        panel.tick_params(labelbottom=place + columns >= len(variants))
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for panel in panels.flat[len(variants) :]:
        panel.set_visible(False)
    figure.suptitle(f"AP over the epochs, %: mean and range\n(grey: {against})", fontsize=9, color=INK)


def _draw_curve(axes: Axes, outcomes: list[Outcome], color: str) -> None:
    """Epochs that all begun runs of a variant have reached."""
    curves = [outcome.curve for outcome in outcomes if outcome.curve]
    epochs = sorted(set.intersection(*map(set, curves))) if curves else []
    values = [[100 * curve[epoch] for curve in curves] for epoch in epochs]
    axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.25, lw=0)
    axes.plot(epochs, [fmean(v) for v in values], color=color, lw=1.6, marker="o" if len(epochs) == 1 else None, ms=3)


def finish(axes: Axes, label: str, grid: str = "x") -> None:
    """Axes with small grey labels, a grid and no frame."""
    axes.set_xlabel(label, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
