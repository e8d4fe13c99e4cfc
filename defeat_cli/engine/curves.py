"""`curves.png`: losses and AP of a run over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from defeat_cli.files import replacing


def draw_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw what metrics.jsonl holds: detection losses, weighted distillation terms, the unweighted head loss on
    foreground and background regions where there is one, and AP."""
    steps = [entry for entry in metrics if entry["kind"] == "train"]
    evaluations = [entry for entry in metrics if entry["kind"] == "eval"]
    detection = _names(steps, "weighted", lambda name: not _is_distillation(name))
    distillation = _names(steps, "weighted", _is_distillation)
    regions = _names(steps, "raw", lambda name: name in ("head_fg", "head_bg"))
    panels = [("detection losses", "weighted", detection)]
    if distillation:
        panels.append(("distillation terms, weighted", "weighted", distillation))
    if regions:
        panels.append(("head loss per region, unweighted", "raw", regions))

    figure = Figure(figsize=(5 * (len(panels) + 1), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for axis, (title, kind, names) in zip(axes, panels, strict=False):
        for name in names:
            points = [(entry["step"], entry[kind][name]) for entry in steps if name in entry[kind]]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.3)
        _label(axis, title)
        if kind == "raw" and names:
            axis.set_yscale("log")
    for figure_name in ("AP", "AP50"):
        points = [(entry["step"], 100 * entry[figure_name]) for entry in evaluations]
        if points:
            axes[-1].plot(*zip(*points, strict=True), marker="o", markersize=3, label=figure_name)
    _label(axes[-1], "COCO AP on the validation images, %")
    axes[-1].set_ylim(bottom=0)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _is_distillation(name: str) -> bool:
    return name.startswith(("neck_", "head_", "backbone_"))


def _names(entries: list[dict[str, Any]], kind: str, wanted: Any) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry[kind] if wanted(name)))


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)
