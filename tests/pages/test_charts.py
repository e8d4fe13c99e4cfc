"""Curves as SVG: where points lie, and what is left out."""

import math
import re

from defeat_cli.engine.curves import Panel, panels
from defeat_cli.pages.charts import chart


def points_of(svg):
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in re.findall(r'points="([^"]*)"', svg)]


def test_points_lie_where_their_values_say():
    svg = chart(Panel("losses", {"a": [(0, 0.0), (50, 5.0), (100, 10.0)]}), 100)
    # 420 wide less 46 and 10 at the sides is 364; 260 high less 10 and 30 is 220, ticks from 0 to 10.
    assert points_of(svg) == [[(46, 230), (228, 120), (410, 10)]]
    svg = chart(Panel("pull", {"a": [(0, 0.01), (50, 1.0), (100, 100.0)]}, log=True), 100)
    assert points_of(svg) == [[(46, 230), (228, 120), (410, 10)]]


def test_values_that_cannot_be_drawn_are_left_out():
    points = [(1, math.nan), (2, 1.0), (3, math.inf), (4, 0.0), (5, 10.0)]
    assert len(points_of(chart(Panel("pull", {"a": points}, log=True), 5))[0]) == 2
    assert len(points_of(chart(Panel("losses", {"a": points}), 5))[0]) == 3
    assert chart(Panel("pull", {"a": [(1, 0.0)]}, log=True), 5) == ""
    assert len(points_of(chart(Panel("flat", {"a": [(1, 2.0), (2, 2.0)]}), 2))[0]) == 2


def test_a_long_curve_is_thinned_out_and_ends_where_it_ended():
    (line,) = points_of(chart(Panel("losses", {"a": [(i, float(i)) for i in range(10_001)]}), 10_000))
    assert len(line) <= 600
    assert line[-1] == (410, 10)


def test_names_are_escaped():
    svg = chart(Panel("<b>", {'"&<i>': [(1, 1.0), (2, 3.0)]}), 2)
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "&lt;i&gt;" in svg


def test_panels_hold_what_was_logged():
    raw = {"neck_fg/P3": 1, "neck_fg": 4}
    steps = [{"kind": "train", "step": s, "weighted": {"loss": 1.0 * s, "neck_fg": 2.0}, "raw": raw} for s in (1, 2)]
    found = panels([*steps, {"kind": "eval", "step": 2, "AP": 0.5, "AP50": 0.75}], ["neck"])
    assert [panel.curves for panel in found] == [
        {"loss": [(1, 1.0), (2, 2.0)]},
        {"neck_fg": [(1, 2.0), (2, 2.0)]},
        {"neck_fg": [(1, 4), (2, 4)]},
        {"AP": [(2, 50.0)], "AP50": [(2, 75.0)]},
    ]
