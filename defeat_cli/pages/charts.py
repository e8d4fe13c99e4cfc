"""A panel of curves as SVG that follows the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator

from defeat_cli.engine.curves import Panel

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 30
SERIES = 8
"""Curves have colours in turn; base.css has as many."""
MOST_POINTS = 600
"""A curve that has more is thinned out."""


def chart(panel: Panel, last: int) -> Markup:
    """The panel's curves over the steps, with ticks; its title and legend are the page's.

    Args:
        last: step at which the axis ends, the same for all panels of a page.

    Returns:
        Nothing where the panel has no point that can be drawn.
    """
    curves = {name: _shown(points, panel.log) for name, points in panel.curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return Markup("")
    values = [value for points in curves.values() for _, value in points]
    y_ticks = _ticks(0.0 if panel.from_zero else min(values), max(values), panel.log)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        low, high, at = (math.log(v) if panel.log else v for v in (y_ticks[0], y_ticks[-1], value))
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in MaxNLocator(5, integer=True).tick_values(0, last).tolist():
        if 0 <= tick <= last:
            anchor = "end" if x(tick) > WIDTH - RIGHT - 12 else "middle"  # or it would be cut
            parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{tick:,.0f}</text>')
    for i, (name, points) in enumerate(curves.items()):
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<g class="s{i % SERIES}"><title>{escape(name)}</title><polyline points="{line}"/>')
        if len(points) <= 30:
            for step, value in points:
                label = f"{escape(name)} at step {step:,}: {value:.4g}"
                parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"><title>{label}</title></circle>')
        parts.append("</g>")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}">'
        f"{''.join(parts)}</svg>"
    )


def _shown(points: Sequence[tuple[int, float]], log: bool) -> list[tuple[int, float]]:
    """The points that can be drawn, thinned out where there are too many; the last one stays."""
    points = [(step, value) for step, value in points if math.isfinite(value) and (value > 0 or not log)]
    every = math.ceil(len(points) / MOST_POINTS)
    return points[:: -max(1, every)][::-1]


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers, the first at or below the lowest value, the last at or above the highest."""
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        high = high if high > low else 10 * low
        locator = LogLocator(numticks=7)
        return [tick for tick in locator.tick_values(low, high).tolist() if low * 0.99 <= tick <= high * 1.01]
    if high <= low:
        high = low + (abs(low) or 1.0)
    return MaxNLocator(5).tick_values(low, high).tolist()
