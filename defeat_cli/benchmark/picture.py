"""AP over latency: what each detector finds, and how long it takes for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from defeat_cli.files import replacing

INK = "#222222"
COLORS, MARKERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c8c8c"), "osD^vP*"
"""In turn; of different lengths, so that many detectors are told apart."""


def draw_ap_over_latency(points: Sequence[tuple[str, float, float]], title: str, path: Path) -> None:
    """Draw detectors as points; further up and further left is better.

    Args:
        points: name, milliseconds an image, AP in [0, 1].
    """
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, milliseconds, ap) in enumerate(points):
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(milliseconds, 100 * ap, ls="", ms=8, label=name, **look)
    axes.margins(x=0.15, y=0.25)
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    axes.set_xlabel("ms an image at batch 1, median", fontsize=8, color=INK)
    axes.set_ylabel("AP, %", fontsize=8, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary)
