"""`curves.png`: losses and AP of a run over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from defeat_cli.files import replacing


def draw_curves(metrics: list[dict[str, Any]], path: Path, terms: Sequence[str] = ()) -> None:
    """Write the picture of `curves` to a file."""
    figure = curves(metrics, terms)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def curves(metrics: list[dict[str, Any]], terms: Sequence[str] = ()) -> Figure:
    """A picture of what metrics.jsonl holds: detection losses, the terms' with and without their weights, and AP.

    Args:
        terms: names of the distillation terms.
    """
    steps = [entry for entry in metrics if entry["kind"] == "train"]
    evaluations = [entry for entry in metrics if entry["kind"] == "eval"]

    def of_term(name: str) -> bool:
        return any(name == term or name.startswith(f"{term}_") for term in terms) and "/" not in name

    panels = [("detection losses", "weighted", _names(steps, "weighted", lambda name: not of_term(name)))]
    if weighted := _names(steps, "weighted", of_term):
        panels.append(("distillation, weighted", "weighted", weighted))
        panels.append(("distillation, unweighted", "raw", _names(steps, "raw", of_term)))

    if pull := _names(steps, "pull", of_term):
        panels.append(("pull of each term against the detection loss's", "pull", pull))

    figure = Figure(figsize=(5 * (len(panels) + 1), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for axis, (title, kind, names) in zip(axes, panels, strict=False):
        for name in names:
            points = [(entry["step"], entry[kind][name]) for entry in steps if name in entry.get(kind, {})]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.3)
        _label(axis, title)
        if kind in ("raw", "pull") and names:
            axis.set_yscale("log")
    for figure_name in ("AP", "AP50"):
        points = [(entry["step"], 100 * entry[figure_name]) for entry in evaluations]
        if points:
            axes[-1].plot(*zip(*points, strict=True), marker="o", markersize=3, label=figure_name)
    _label(axes[-1], "COCO AP on the validation images, %")
    axes[-1].set_ylim(bottom=0)
    return figure


def _names(entries: list[dict[str, Any]], kind: str, wanted: Any) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.get(kind, {}) if wanted(name)))


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)
