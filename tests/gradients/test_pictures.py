"""Pictures hold what they are said to hold: colours where the map has values, panels, names, and room for all text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from defeat_cli.gradients import pictures
from defeat_cli.gradients.numbers import map_numbers
from defeat_cli.gradients.pictures import (
    DIMMING,
    Panel,
    Row,
    Scale,
    View,
    common_scale,
    draw_contact_sheet,
    draw_panels,
    level_panels,
    overlay,
    sum_over_levels,
    thumbnails,
)

LINEAR = Scale(Normalize(0, 1), "unit")
BOX = torch.tensor([[9.0, 9.0, 45.0, 30.0]])


def view(height: int = 60, width: int = 90, boxes: torch.Tensor = BOX) -> View:
    return View(torch.full((3, height, width), 200, dtype=torch.uint8), boxes)


def test_sum_over_levels_adds_each_coarse_cell_to_all_that_it_covers():
    fine = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    coarse = np.array([[10.0, 20.0], [30.0, 40.0]])
    assert sum_over_levels([fine, coarse], [4, 8]).tolist() == [[11, 12, 23], [14, 15, 26], [37, 38, 49]]


def test_overlay_colours_the_cells_of_the_image_and_nothing_else():
    """Cells of 8 pixels on an image of 12 x 20: the last row and column of cells reach over the edge, and are cut."""
    values = np.array([[0.0, 0.25, 0.0], [0.0, 0.0, 1.0]])
    lightness = overlay(view(12, 20), Panel("", values, 8, BOX), LINEAR).float().mean(dim=0)
    assert lightness.shape == (12, 20)
    dark, dim, bright = lightness[0, 0], lightness[0, 8], lightness[8, 16]
    assert float(dark) == pytest.approx(DIMMING * 200, abs=3)  # inferno's black is a little blue
    assert dark + 5 < dim < bright
    expected = torch.full((12, 20), float(dark))
    expected[:8, 8:16], expected[8:, 16:] = dim, bright
    assert torch.equal(lightness, expected)


@pytest.mark.parametrize("scale", [LINEAR, *(common_scale([np.ones(1)], "", decades) for decades in (False, True))])
def test_more_is_always_lighter(scale: Scale):
    """So the scale can be read without telling hues apart, and over any photograph."""
    for grey in (0, 0.5, 1):
        lightness = scale.light(np.linspace(0, 1, 200), np.full((200, 3), DIMMING * grey)) @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(lightness) > -1e-3).all()
        assert lightness[-1] > lightness[0] + 0.4


def test_scales_are_common_and_not_ruled_by_a_single_cell():
    flat = np.full((10, 100), 2.0)
    flat[0, 0] = 1000.0
    roots, decades = (common_scale([flat, np.ones((2, 2))], "", kind).norm for kind in (False, True))
    assert roots([0.0, 0.5, 2.0, 1000.0]).tolist() == [0.0, 0.5, 1.0, 1.0]
    # asinh(1000 x / top) / asinh(1000): a tenth of the top is a decade, ln 10 of ln 2000, below it.
    assert decades([0.0, 0.2, 2.0]).tolist() == pytest.approx([0, 1 - np.log(10) / np.log(2000), 1], abs=1e-4)
    rare = np.zeros((10, 100))
    rare[0, 0] = 3.0
    assert common_scale([rare], "", decades=False).norm([3.0, 0.75]).tolist() == [1.0, 0.5]
    assert common_scale([np.zeros((2, 2))], "", decades=False).norm([0.0]).tolist() == [0.0]


def rows(*names: str, inside: float = 2.0) -> list[Row]:
    """Rows of three levels, the second of them dark, with boxes on the first alone."""
    maps = [np.full((4, 6), value) for value in (1.0, 0.0, 0.5)]
    numbers = map_numbers([np.array([[inside, 1.0]])] * 2, [np.array([[True, False]])] * 2, ["P2", "P3"])
    panels = level_panels(maps, [16, 32, 32], [BOX, BOX[:0], BOX[:0]])
    return [Row(name, panels, numbers) for name in names]


def test_a_picture_has_the_image_its_maps_their_chart_and_the_scale(tmp_path: Path, figures: list[Figure]):
    draw_panels(view(), rows("a"), LINEAR, tmp_path / "one.png", heading="heading", note="note")
    (figure,) = figures
    image, finest, dark, last, chart, spare, bar = figure.axes
    titles = [axes.get_title(loc="left") for axes in (image, finest, dark, last, chart, spare)]
    assert titles == ["image, 1 box", "P4 · stride 16", "P5 · stride 32", "P5b · stride 32", "mean per cell", ""]
    assert bar.get_xlabel() == "unit"
    assert [figure.get_suptitle(), figure.get_supxlabel()] == ["heading", "note"]
    shown = [axes.images[0].get_array() for axes in (image, finest, dark, last)]
    assert {array.shape for array in shown} == {(400, 600, 3)}
    assert (shown[0][-1, -1] == 200).all()
    assert shown[1][-1, -1].mean() > shown[3][-1, -1].mean() > shown[2][-1, -1].mean() == pytest.approx(80, abs=3)
    # The box's upper edge lies 9 of 60 pixels below the image's: cyan has more blue than red.
    edge = [array[57:64, 180].astype(int) for array in shown]
    assert [(pixels[:, 2] - pixels[:, 0]).max() > 100 for pixels in edge] == [True, True, False, False]
    assert [text.get_text() for text in chart.texts] == ["×2.0", "×2.0"]
    assert chart.get_ylim() == pytest.approx((0.1, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png"]


def test_rows_stand_under_each_other_and_charts_share_their_axis(tmp_path: Path, figures: list[Figure]):
    several = rows("first") + rows("second", inside=300.0)
    draw_panels(view(), several, LINEAR, tmp_path / "rows.png", heading="h", note="n")
    axes = figures[0].axes
    assert [axes[0].get_ylabel(), axes[5].get_ylabel()] == ["first", "second"]
    assert axes[4].get_ylim() == axes[9].get_ylim() == pytest.approx((0.1, 1000))


@pytest.mark.parametrize("size", [(60, 90), (200, 40), (20, 300)])
def test_text_stays_within_the_picture(
    tmp_path: Path, figures: list[Figure], recwarn: pytest.WarningsRecorder, size: tuple[int, int]
):
    """Names of files are no formulas, and what the font lacks is no reason to fail; nor is a map without pull."""
    heading = pictures.shortened("cost_$x^$_" + "long" * 60 + "名前.jpg", 60)
    assert len(heading) <= 61
    empty = [Row("a", rows("")[0].panels, map_numbers([np.zeros((1, 1))], [np.zeros((1, 1), dtype=bool)], ["P2"]))]
    draw_panels(
        view(*size), empty, LINEAR, tmp_path / "x.png", heading=f"{heading} · " + "word " * 9, note="note " * 60
    )
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in (*figure.texts, figure._suptitle, figure._supxlabel, *(axes.title for axes in figure.axes)):
        extent = text.get_window_extent(renderer)
        assert figure.bbox.x0 <= extent.x0 <= extent.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 <= extent.y0 <= extent.y1 <= figure.bbox.y1 + 1


def test_a_contact_sheet_puts_each_image_beside_its_maps(tmp_path: Path, figures: list[Figure]):
    maps = [[Panel("sum", np.full((4, 5), value), 8, BOX)] for value in (0.0, 1.0, 0.0, 1.0, 0.0)]
    strips = [thumbnails(view(30, 40, BOX[:0]), panels, LINEAR, side=80) for panels in maps]
    assert [strip.shape for strip in strips] == [(3, 60, 168)] * 5
    captions = ["first", "second" * 20, "third", "fourth", "fifth"]
    draw_contact_sheet(strips, captions, tmp_path / "sheet.png", "heading", "note")
    (axes,) = figures[0].axes
    lines = axes.images[0].get_array().mean(axis=2)[4 + 30 :: 60 + 22 + 4]
    middles = [line[place] for line in lines for place in (44, 128, 216, 300)]
    dark, bright = pytest.approx(80, abs=3), pytest.approx(225, abs=30)
    assert middles == [200, dark, 200, bright, 200, dark, 200, bright, 200, dark, 255, 255]
    assert [text.get_text() for text in axes.texts] == ["first", "secondsecond…secondsecond", *captions[2:]]
    assert (tmp_path / "sheet.png").is_file()
