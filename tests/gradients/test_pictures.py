"""Pictures hold what they are said to hold: sizes, colours where the map has values, nothing of the padding."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defeat_cli.gradients import pictures as drawing
from defeat_cli.gradients.pictures import (
    BOX_COLOR,
    DPI,
    ContactSheet,
    Means,
    Panel,
    Row,
    Scale,
    View,
    common_scale,
    draw_panels,
    overlay,
    round_ticks,
    sum_over_levels,
    times,
)

LIGHTNESS = np.array([0.2126, 0.7152, 0.0722])
CYAN = np.array([int(BOX_COLOR[i : i + 2], 16) for i in (1, 3, 5)])


def view(height: int = 60, width: int = 90, boxes: list[list[float]] | None = None) -> View:
    return View(np.full((height, width, 3), 200, np.uint8), np.array(boxes or [], np.float32).reshape(-1, 4))


def is_dark(pixels: np.ndarray) -> bool:
    """Whether these are of the dimmed image of `view`, with no light on it; inferno's black is a little blue."""
    return bool((abs(pixels.astype(int) - round(drawing.DIMMING * 200)) <= 3).all())


def test_sum_over_levels_adds_each_coarse_cell_to_all_that_it_covers():
    fine = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    coarse = np.array([[10.0, 20.0], [30.0, 40.0]])
    assert sum_over_levels([fine, coarse], [4, 8]).tolist() == [[11, 12, 23], [14, 15, 26], [37, 38, 49]]


def test_overlay_colours_the_cells_of_the_image_and_nothing_else():
    """Cells of 8 pixels on an image of 12 x 20: the last row and column of cells reach over the edge, and are cut."""
    values = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    picture = overlay(view(12, 20), Panel("", values, 8), Scale(4.0, ""))
    assert picture.shape == (12, 20, 3)
    assert is_dark(picture[:, :8])
    assert is_dark(picture[8:, 8:16])
    assert (picture[:8, 8:16] == picture[0, 8]).all()
    assert (picture[8:, 16:] == picture[8, 16]).all()
    assert picture[0, 8] @ LIGHTNESS > picture[0, 0] @ LIGHTNESS + 5
    assert picture[8, 16] @ LIGHTNESS > picture[0, 8] @ LIGHTNESS


@pytest.mark.parametrize("root", [1, 2, 4])
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_more_is_always_lighter(root: int, grey: int):
    """So the scale can be read without telling hues apart, and over any photograph."""
    values = np.linspace(0, 1, 200)[None]
    colours = Scale(1.0, "", root).blend(values, np.full((1, 200, 3), drawing.DIMMING * grey))
    lightness = colours[0] @ LIGHTNESS
    assert (np.diff(lightness) > -0.8).all()  # a byte's rounding
    assert lightness[-1] > lightness[0] + 100


def test_scale_is_common_and_not_ruled_by_a_single_cell():
    flat = np.full((10, 100), 2.0)
    flat[0, 0] = 1000.0
    scale = common_scale([flat, np.ones((2, 2))], "unit", root=2)
    assert scale.high == 2.0
    assert scale.share(np.array([0.0, 0.5, 2.0, 1000.0])).tolist() == [0.0, 0.5, 1.0, 1.0]
    rare = np.zeros((10, 100))
    rare[0, 0] = 3.0
    assert common_scale([rare], "unit", root=2).high == 3.0
    assert common_scale([np.zeros((2, 2))], "unit", root=2).share(np.zeros(1)).tolist() == [0.0]


@pytest.mark.parametrize(
    ("scale", "ticks", "power"),
    [
        (Scale(6.1e-4, "", root=2), [0, 5e-5, 1e-4, 2e-4, 5e-4], -4),
        (Scale(1.2e-3, "", root=2), [0, 1e-4, 2e-4, 5e-4, 1e-3], -3),
        (Scale(1.5e-3, "", root=4), [0, 1e-6, 1e-5, 1e-4, 1e-3], -3),
        (Scale(1.0, ""), [0, 0.5, 1], 0),
        (Scale(0.0, ""), [0], 0),
    ],
)
def test_ticks_are_round(scale: Scale, ticks: list[float], power: int):
    values, exponent = round_ticks(scale)
    assert values == pytest.approx(ticks)
    assert exponent == power


def test_ratios_are_written_with_the_digits_they_deserve():
    assert [times(ratio) for ratio in (0.0, 0.8512, 0.9999, 3.24, 9.97, 41.3)] == [
        "×0.00",
        "×0.85",
        "×1.0",
        "×3.2",
        "×10",
        "×41",
    ]


def test_a_log_axis_has_two_ticks_at_least():
    assert drawing._log_ticks(3e-6, 2e-3) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert drawing._log_ticks(0.015, 0.3) == pytest.approx([0.02, 0.05, 0.1, 0.2])


def panels(values: float = 1.0) -> list[Panel]:
    return [Panel(f"P{level}", np.full((4, 6), values), 16) for level in (2, 3, 4)]


def means() -> Means:
    return Means(["P2", "P3"], np.array([2.0, np.nan]), np.array([1.0, 0.0]))


def cell(path: Path, line: int, column: int, size: tuple[int, int], row_names: bool = False) -> np.ndarray:
    """Pixels of a cell of a picture, by the layout's own inches."""
    width, height = (math.sqrt(drawing.PANEL_AREA * r) for r in (size[1] / size[0], size[0] / size[1]))
    left = drawing.GAP + (drawing.ROW_NAME if row_names else 0) + column * (width + drawing.GAP)
    top = drawing.HEADING + line * (height + drawing.TITLE + drawing.GAP) + drawing.TITLE
    pixels = np.asarray(Image.open(path).convert("RGB"))
    box = [round(DPI * inches) for inches in (top, top + height, left, left + width)]
    return pixels[box[0] + 2 : box[1] - 2, box[2] + 2 : box[3] - 2]


def test_a_picture_has_the_image_its_maps_and_their_chart(tmp_path: Path):
    """Five cells in two lines; the second map is dark, the others are bright, and boxes are outlined on all."""
    path, image = tmp_path / "one.png", view(boxes=[[9.0, 9.0, 45.0, 30.0]])
    maps = panels()
    maps[1] = Panel("P3", np.zeros((4, 6)), 16)
    draw_panels(
        image, [Row("a", maps, means())], Scale(1.0, "unit"), path, heading="heading", note="note", boxes="image"
    )
    ratio = 90 / 60
    width = drawing.GAP + 3 * (math.sqrt(7 * ratio) + drawing.GAP)
    height = drawing.HEADING + 2 * (math.sqrt(7 / ratio) + drawing.TITLE + drawing.GAP) + drawing.FOOTER
    assert Image.open(path).size == pytest.approx((DPI * width, DPI * height), abs=1)
    corner = {place: cell(path, *place, (60, 90))[-5, -5] for place in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))}
    assert (corner[0, 0] == 200).all()  # the image itself, down to its corner
    bright = overlay(image, maps[0], Scale(1.0, "unit"))[-1, -1]
    assert (abs(corner[0, 1].astype(int) - bright) <= 1).all()
    assert is_dark(corner[0, 2])
    assert (abs(corner[1, 0].astype(int) - bright) <= 1).all()
    assert (corner[1, 1] == 255).all()  # the chart
    for place in ((0, 0), (0, 1), (0, 2), (1, 0)):
        drawn = cell(path, *place, (60, 90)).astype(int)
        edge = drawn[round(drawn.shape[0] * 20 / 60), round(drawn.shape[1] * 9 / 90) - 4 :][:8]
        assert abs(edge - CYAN).sum(axis=1).min() < 90, place
    assert not list(tmp_path.glob(".*"))


def test_rows_stand_under_each_other_and_may_differ_in_length(tmp_path: Path):
    path = tmp_path / "rows.png"
    rows = [Row("first", panels(1.0)), Row("second", panels(0.0)[:2])]
    draw_panels(view(), rows, Scale(1.0, "unit"), path, heading="h", note="n", boxes="image")
    upper, lower = (cell(path, line, 1, (60, 90), row_names=True)[5, 5] for line in (0, 1))
    assert upper @ LIGHTNESS > lower @ LIGHTNESS + 100
    assert (cell(path, 1, 3, (60, 90), row_names=True) == 255).all()


def test_names_of_files_are_no_formulas_and_are_shortened_to_fit(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    path = tmp_path / "named.png"
    heading = "cost_$x^$_" + "long" * 60 + "名前.jpg"
    draw_panels(view(), [Row("a", panels())], Scale(1.0, "unit"), path, heading=heading, note="n" * 400, boxes="i")
    pixels = np.asarray(Image.open(path).convert("L"))
    assert (pixels[: round(DPI * drawing.HEADING), -8:] == 255).all()
    assert (pixels[: round(DPI * 0.4)] < 128).any()
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_contact_sheet_puts_each_image_beside_its_maps(tmp_path: Path):
    sheet = ContactSheet(5, maps=1, heading="heading", note="note")
    for brightness in (0.0, 1.0, 0.0):  # two of five images could not be used
        sheet.add(view(30, 40), [Panel("sum", np.full((4, 5), brightness), 8)], Scale(1.0, ""), "caption " * 40)
    sheet.save(tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(float)
    assert sheet.columns == 2
    assert pixels.shape[0] == sheet.HEAD + 2 * sheet.row_height
    middle = sheet.HEAD + sheet.tile * 3 // 8
    tiles = [
        pixels[middle + r * sheet.row_height, sheet.GAP + sheet.tile // 2 + c * sheet.tile] for r, c in ((0, 0), (0, 1))
    ]
    assert (tiles[0] == 200).all()
    assert is_dark(tiles[1])
    second = pixels[middle, sheet.GAP + 2 * sheet.tile + sheet.GAP + sheet.tile * 3 // 2]
    assert second @ LIGHTNESS > 150
    assert (pixels[middle + sheet.row_height, sheet.GAP + 2 * sheet.tile + sheet.GAP + sheet.tile // 2] == 255).all()


@pytest.mark.parametrize("count", [1, 3, 50, 2000])
def test_a_contact_sheet_stays_of_a_size_to_look_at(count: int):
    sheet = ContactSheet(count, maps=2, heading="heading", note="note").sheet
    assert 600 <= sheet.width < 6000
    assert sheet.height < 6000
    assert sheet.width / sheet.height < 4
