"""`curves.png`: losses and AP of a run over its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Panel:
    """curves: by name, its (step, value) points. log: whether values are to be on a logarithmic scale."""

    title: str
    curves: dict[str, list[tuple[int, float]]]
    log: bool = False
    from_zero: bool = False


def panels(metrics: list[dict[str, Any]], terms: Sequence[str] = ()) -> list[Panel]:
    """What metrics.jsonl holds: detection losses, the terms' with and without their weights, their pulls, and AP.

    Args:
        terms: names of the distillation terms.
    """
    steps = [entry for entry in metrics if entry["kind"] == "train"]
    evaluations = [entry for entry in metrics if entry["kind"] == "eval"]

    def of_term(name: str) -> bool:
        return any(name == term or name.startswith(f"{term}_") for term in terms) and "/" not in name

    def of(kind: str, wanted: Callable[[str], bool]) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in steps:
            for name, value in entry.get(kind, {}).items():
                if wanted(name):
                    found.setdefault(name, []).append((entry["step"], value))
        return found

    made = [Panel("detection losses", of("weighted", lambda name: not of_term(name)))]
    if weighted := of("weighted", of_term):
        made.append(Panel("distillation, weighted", weighted))
        made.append(Panel("distillation, unweighted", of("raw", of_term), log=True))
    if pull := of("pull", of_term):
        made.append(Panel("pull of each term against the detection loss's", pull, log=True))
    ap = {name: [(entry["step"], 100 * entry[name]) for entry in evaluations] for name in ("AP", "AP50")}
    ap = {name: points for name, points in ap.items() if points}
    return [*made, Panel("COCO AP on the validation images, %", ap, from_zero=True)]


def curves(metrics: list[dict[str, Any]], terms: Sequence[str] = ()) -> Figure:
    """A picture of the `panels`, side by side."""
    made = panels(metrics, terms)
    figure = Figure(figsize=(5 * len(made), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(made), squeeze=False)[0], made, strict=True):
        for name, points in panel.curves.items():
            dots = panel.from_zero or len(points) == 1  # a line through one point cannot be seen
            marks = {"marker": "o", "markersize": 3} if dots else {"linewidth": 1.3}
            axis.plot(*zip(*points, strict=True), label=name, **marks)
        _label(axis, panel.title)
        if panel.log and panel.curves:
            axis.set_yscale("log")
        if panel.from_zero:
            axis.set_ylim(bottom=0)
    return figure


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)
