"""Pictures of the neck: maps laid over their image level by level, and a contact sheet of many images.

Every picture cuts the batch padding away, keeps the image's aspect ratio, and has one colour scale for all its panels.
Figures are built without pyplot, so that nothing stays behind and no display is needed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from defeat_cli.files import replacing

COLORS = matplotlib.colormaps["inferno"]
"""From black to a light yellow, ever lighter: it needs no telling of hues, and survives a grey print."""
DIMMING = 0.4
"""Lightness of the grey image that maps are thrown upon."""
BOX_COLOR = "#38d9f5"
"""Cyan: the colour map has none of it, and few photographs have."""
INSIDE_COLOR, OUTSIDE_COLOR, TEXT_COLOR = "#ed6925", "#8a8a8a", "#444444"

DPI = 110
PANEL_AREA = 7.0
"""Square inches of a panel, whatever the image's aspect ratio."""
GAP, TITLE, HEADING, FOOTER, ROW_NAME = 0.14, 0.26, 0.72, 0.62, 0.3
"""Inches between panels, over each panel, over and under the whole, and left of each row where there are several."""


@dataclass(frozen=True)
class View:
    """An image as the network saw it.

    pixels: [h, w, 3] uint8, the image's own area.
    boxes: [M, 4] xyxy in these pixels.
    """

    pixels: np.ndarray
    boxes: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[:2]

    @cached_property
    def backdrop(self) -> np.ndarray:
        """[h, w, 3] float in [0, 255]: the image in dim grey, over which colour stands out."""
        grey = self.pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        return np.repeat(DIMMING * grey[..., None], 3, axis=2)


@dataclass(frozen=True)
class Scale:
    """What colours mean: from 0, where the image shows through, to `high` and above, the brightest.

    label: the unit, as the picture states it.
    root: colours follow this root of the value: 1 is linear; 2 and 4 bring out what is weak, and keep zero at zero.
    strength: how strongly the brightest colour covers the image, in [0, 1].
    """

    high: float
    label: str
    root: int = 1
    strength: float = 1.0

    def share(self, values: np.ndarray) -> np.ndarray:
        """Place of values on the scale, in [0, 1]."""
        share = np.clip(values / (self.high or 1.0), 0, 1)
        return share ** (1 / self.root)

    def blend(self, values: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
        """[h, w, 3] uint8: [h, w] values as coloured light on a backdrop in [0, 255]: next to none at zero."""
        light = self.strength * COLORS(self.share(values))[..., :3]
        return (backdrop + (255 - backdrop) * light).round().astype(np.uint8)


@dataclass(frozen=True)
class Panel:
    """One map over the image.

    values: [h, w], one non-negative value a cell; cells may reach over the image's edge.
    stride: pixels that a cell measures.
    boxes: [M, 4] those to outline; None outlines all of the view's.
    """

    title: str
    values: np.ndarray
    stride: int
    boxes: np.ndarray | None = None


@dataclass(frozen=True)
class Means:
    """Mean values inside and outside boxes, a level each; NaN where there is no such cell."""

    labels: list[str]
    inside: np.ndarray
    outside: np.ndarray


@dataclass(frozen=True)
class Row:
    """Maps that belong together, e.g. one detector's."""

    name: str
    panels: list[Panel]
    means: Means | None = None


def sum_over_levels(maps: Sequence[np.ndarray], strides: Sequence[int]) -> np.ndarray:
    """Sum of [h_l, w_l] maps at the finest level's resolution: a cell adds its value to each finest cell it covers."""
    return sum(
        _at_resolution(values, stride, maps[0].shape, strides[0]) for values, stride in zip(maps, strides, strict=True)
    )


def _at_resolution(values: np.ndarray, stride: int, shape: tuple[int, int], step: int = 1) -> np.ndarray:
    """A map of cells of `stride` pixels, looked up every `step` pixels; nothing is smoothed: cells stay visible."""
    rows = np.minimum(np.arange(shape[0]) * step // stride, values.shape[0] - 1)
    columns = np.minimum(np.arange(shape[1]) * step // stride, values.shape[1] - 1)
    return values[rows[:, None], columns[None, :]]


def common_scale(maps: Iterable[np.ndarray], label: str, root: int) -> Scale:
    """A scale whose top at most one cell in 100 exceeds on any of the maps.

    A single hot cell would otherwise leave everything else dark.
    """
    maps = list(maps)
    high = max(float(np.quantile(values, 0.99)) for values in maps) or max(float(values.max()) for values in maps)
    return Scale(high, label, root)


def round_ticks(scale: Scale) -> tuple[np.ndarray, int]:
    """Round values from 0 to the top of a scale, and the power of ten to write them with.

    They are the last of 1, 2, 5, 10, 20 …; on a fourth root, which spreads more decades, the last powers of ten.
    """
    if scale.high <= 0:
        return np.array([0.0]), 0
    top = math.floor(math.log10(scale.high))
    digits, count = {1: ((1, 2, 5), 2), 2: ((1, 2, 5), 4), 4: ((1,), 4)}[scale.root]
    steps = [digit * 10.0**decade for decade in range(top - 3, top + 1) for digit in digits]
    ticks = [step for step in steps if step <= scale.high * (1 + 1e-9)][-count:]
    return np.array([0.0, *ticks]), top if not -2 <= top <= 2 else 0


def times(ratio: float) -> str:
    """A ratio in as many digits as it deserves: `×0.85`, `×3.2`, `×41`."""
    return f"×{ratio:.{2 if ratio < 0.995 else 1 if ratio < 9.95 else 0}f}"


def overlay(view: View, panel: Panel, scale: Scale) -> np.ndarray:
    """[h, w, 3] uint8: the panel's map over the image; what of it reaches over the image's edge is cut away."""
    return scale.blend(_at_resolution(panel.values, panel.stride, view.size), view.backdrop)


def draw_panels(view: View, rows: list[Row], scale: Scale, path: Path, *, heading: str, note: str, boxes: str) -> None:
    """Write one picture: the image with its boxes, and maps over it.

    Args:
        rows: a single row is broken into two lines; several are put under each other, for comparison.
        heading: what is shown; note: how to read it, smaller under it; boxes: whose boxes they are.
        path: a .png file, replaced whole.
    """
    lines = [[_Image(view, boxes), *(_Map(view, panel, scale) for panel in row.panels)] for row in rows]
    limits = _limits([row.means for row in rows if row.means])
    for line, row in zip(lines, rows, strict=True):
        if row.means:
            line.append(_Chart(row.means, limits))
    if len(rows) == 1:
        half = math.ceil(len(lines[0]) / 2)
        lines = [lines[0][:half], lines[0][half:]]
    figure = _Sheet(view.size, lines=len(lines), columns=max(map(len, lines)), row_names=len(rows) > 1)
    figure.head(heading, note)
    for number, line in enumerate(lines):
        for column, cell in enumerate(line):
            cell.draw(figure.cell(number, column))
        if len(rows) > 1:
            figure.name_row(number, rows[number].name)
    figure.scale_bar(scale)
    figure.save(path)


def _limits(charts: list[Means]) -> tuple[float, float]:
    """Ends of a log axis that all charts fit on, with room for a legend at its top."""
    values = np.concatenate([values for means in charts for values in (means.inside, means.outside)] or [[]])
    drawn = values[values > 0]
    return (float(drawn.min()) / 2, float(drawn.max()) * 4) if drawn.size else (0.1, 1.0)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two values; where there are fewer than two, their doubles and fives too."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens, finer = ([digit * 10.0**k for k in decades for digit in digits] for digits in ((1,), (1, 2, 5)))
    inside = [tick for tick in tens if low <= tick <= high]
    return inside if len(inside) > 1 else [tick for tick in finer if low <= tick <= high]


class _Sheet:
    """A figure laid out in inches from the top left corner: heading, lines of equal cells, colour bar."""

    def __init__(self, size: tuple[int, int], lines: int, columns: int, row_names: bool) -> None:
        ratio = size[1] / size[0]
        self.cell_width, self.cell_height = math.sqrt(PANEL_AREA * ratio), math.sqrt(PANEL_AREA / ratio)
        self.left = GAP + (ROW_NAME if row_names else 0)
        self.width = max(self.left + columns * (self.cell_width + GAP), 7.0)
        self.height = HEADING + lines * (self.cell_height + TITLE + GAP) + FOOTER
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        bottom = self.height - y - height
        return self.figure.add_axes((x / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(self, x: float, y: float, text: str, **style: object) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)

    def cell_top(self, line: int) -> float:
        return HEADING + line * (self.cell_height + TITLE + GAP) + TITLE

    def cell(self, line: int, column: int) -> Axes:
        x = self.left + column * (self.cell_width + GAP)
        return self.axes(x, self.cell_top(line), self.cell_width, self.cell_height)

    def head(self, heading: str, note: str) -> None:
        """Two lines of text, shortened where the picture is narrow. Names of files are no formulas, `$` or not."""
        room = (
            0.95 * 72 * (self.width - 2 * GAP)
        )  # letters are set a little wider in the picture than they measure here
        heading = _shortened(heading, lambda text: _font(13, bold=True).getlength(text) <= room)
        note = _shortened(note, lambda text: _font(10).getlength(text) <= room)
        self.text(GAP, 0.28, heading, size=13, weight="bold", va="center", parse_math=False)
        self.text(GAP, 0.56, note, size=10, color=TEXT_COLOR, va="center", parse_math=False)

    def name_row(self, line: int, name: str) -> None:
        middle = self.cell_top(line) + self.cell_height / 2
        self.text(GAP + 0.1, middle, name, size=11, weight="bold", rotation=90, ha="center", va="center")

    def scale_bar(self, scale: Scale) -> None:
        """The colours as panels show them: over the grey of a middling image."""
        width = min(4.0, self.width / 2)
        axes = self.axes(self.left, self.height - FOOTER + 0.1, width, 0.15)
        shares = np.linspace(0, 1, 256)
        values = scale.high * shares**scale.root
        axes.imshow(scale.blend(values[None], np.full((1, 256, 3), 128 * DIMMING)), aspect="auto", extent=(0, 1, 0, 1))
        ticks, power = round_ticks(scale)
        axes.set_xticks(scale.share(ticks), [f"{tick / 10.0**power:g}" for tick in ticks], size=8)
        axes.set_yticks([])
        axes.tick_params(length=2)
        unit = f"× $10^{{{power}}}$   " if power else ""
        x, y = self.left + width + 0.15, self.height - FOOTER + 0.18
        self.text(x, y, unit + scale.label, size=10, color=TEXT_COLOR, va="center")

    def save(self, path: Path) -> None:
        with replacing(path) as temporary, warnings.catch_warnings():
            # A name in a script that the font has not is drawn as boxes; the picture is worth having all the same.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            self.canvas.print_png(str(temporary))


@dataclass(frozen=True)
class _Image:
    view: View
    title: str

    def draw(self, axes: Axes) -> None:
        _show(axes, self.view, self.view.pixels, self.title)
        _outline(axes, self.view.boxes, width=1.4)


@dataclass(frozen=True)
class _Map:
    view: View
    panel: Panel
    scale: Scale

    def draw(self, axes: Axes) -> None:
        _show(axes, self.view, overlay(self.view, self.panel, self.scale), self.panel.title)
        _outline(axes, self.view.boxes if self.panel.boxes is None else self.panel.boxes, width=0.7)


@dataclass(frozen=True)
class _Chart:
    means: Means
    limits: tuple[float, float]

    def draw(self, axes: Axes) -> None:
        """Dots on a log axis: levels differ by orders of magnitude, and what matters is the ratio of two dots."""
        places = np.arange(len(self.means.labels))
        inside, outside = (np.where(values > 0, values, np.nan) for values in (self.means.inside, self.means.outside))
        axes.vlines(places, inside, outside, color="#c8c8c8", linewidth=3, zorder=1)
        axes.scatter(places, inside, 44, INSIDE_COLOR, label="inside boxes", zorder=3)
        axes.scatter(places, outside, 44, OUTSIDE_COLOR, label="outside", zorder=2)
        for place, ratio in zip(places, inside / outside, strict=True):
            if not math.isnan(ratio):
                middle = math.sqrt(inside[place] * outside[place])
                axes.annotate(times(ratio), (place, middle), (7, -3), textcoords="offset points", size=8)
        axes.set_xticks(places, self.means.labels, size=9)
        axes.set_xlim(-1.1, len(places) - 0.1)
        axes.set_yscale("log")
        ticks = _log_ticks(*self.limits)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], size=8)
        axes.set_yticks([], minor=True)
        axes.set_ylim(*self.limits)
        axes.tick_params(axis="y", direction="in", pad=-8)
        for label in axes.get_yticklabels():
            label.set_ha("left")
        axes.tick_params(axis="x", length=0)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2, borderaxespad=0, handletextpad=0.1)
        axes.set_title("mean per cell", size=10, loc="left", pad=4)


def _show(axes: Axes, view: View, pixels: np.ndarray, title: str) -> None:
    height, width = view.size
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto")
    axes.set_axis_off()
    axes.set_title(title, size=10, loc="left", pad=4)


def _outline(axes: Axes, boxes: np.ndarray, width: float) -> None:
    x1, y1, x2, y2 = boxes.reshape(-1, 4).T
    corners = np.stack([x1, y1, x2, y1, x2, y2, x1, y2, x1, y1], axis=1).reshape(-1, 5, 2)
    axes.add_collection(LineCollection(corners, colors=BOX_COLOR, linewidths=width), autolim=False)


class ContactSheet:
    """Small pictures of many images on one sheet: each image beside its maps. Holds the sheet's pixels, not the images.

    Args:
        count: how many images will come; decides how small they are.
        maps: how many maps each of them has.
        heading: what is shown; note: how to read it, smaller under it.
    """

    WIDEST, NARROWEST, SHEET_WIDTH = 300, 60, 2400
    """Pixels of a thumbnail, and of the sheet."""
    HEAD, GAP = 64, 12

    def __init__(self, count: int, maps: int, heading: str, note: str) -> None:
        self.across = 1 + maps
        self.columns = max(1, round(math.sqrt(1.2 * count / self.across)))
        room = self.SHEET_WIDTH / (self.across * self.columns)
        self.tile = int(min(self.WIDEST, max(self.NARROWEST, room)))
        self.font = _font(max(9, self.tile // 20))
        self.row_height = self.tile * 3 // 4 + 2 * self.font.size
        width = self.GAP + self.columns * (self.across * self.tile + self.GAP)
        lines = ((heading, 10, _font(15), "black"), (note, 36, _font(12), TEXT_COLOR))
        width = max(width, *(int(font.getlength(text)) + 2 * self.GAP for text, _, font, _ in lines))
        self.sheet = Image.new("RGB", (width, self.HEAD + math.ceil(count / self.columns) * self.row_height), "white")
        for text, y, font, color in lines:
            ImageDraw.Draw(self.sheet).text((self.GAP, y), text, color, font)
        self.used = 0

    def add(self, view: View, panels: Sequence[Panel], scale: Scale, caption: str) -> None:
        """Put the next image and its maps on the sheet."""
        row, column = divmod(self.used, self.columns)
        x = self.GAP + column * (self.across * self.tile + self.GAP)
        y = self.HEAD + row * self.row_height
        for place, pixels in enumerate([view.pixels, *(overlay(view, panel, scale) for panel in panels)]):
            thumbnail = _thumbnail(pixels, view.boxes, (self.tile - 3, self.tile * 3 // 4))
            left = x + place * self.tile + (self.tile - thumbnail.width) // 2
            self.sheet.paste(thumbnail, (left, y + (self.tile * 3 // 4 - thumbnail.height) // 2))
        text = _shortened(caption, lambda text: self.font.getlength(text) <= self.across * self.tile)
        ImageDraw.Draw(self.sheet).text((x + 2, y + self.tile * 3 // 4 + 2), text, "#222222", self.font)
        self.used += 1

    def save(self, path: Path) -> None:
        """Write what is on the sheet."""
        height = self.HEAD + math.ceil(self.used / self.columns) * self.row_height
        with replacing(path) as temporary:
            self.sheet.crop((0, 0, self.sheet.width, height)).save(temporary)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans:bold" if bold else "DejaVu Sans"), size)


def _thumbnail(pixels: np.ndarray, boxes: np.ndarray, room: tuple[int, int]) -> Image.Image:
    """[h, w, 3] uint8 with its boxes, as large as fits into (width, height)."""
    height, width = pixels.shape[:2]
    factor = min(room[0] / width, room[1] / height)
    thumbnail = Image.fromarray(pixels).resize((max(1, round(width * factor)), max(1, round(height * factor))))
    draw = ImageDraw.Draw(thumbnail)
    for box in (boxes * factor).tolist():
        draw.rectangle(box, outline=BOX_COLOR)
    return thumbnail


def _shortened(text: str, fits: Callable[[str], bool]) -> str:
    """The text with letters left out in its middle until it fits."""
    short, cut = text, 0
    while not fits(short) and cut < len(text):
        cut += 1
        keep = len(text) - cut
        short = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    return short
