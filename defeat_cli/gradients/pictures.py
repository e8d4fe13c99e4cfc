"""Pictures of the neck: maps as light on their image, level by level, and a contact sheet of many images.

Figures are built without pyplot, so that nothing stays behind and no display is needed.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm, ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from torch import Tensor
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale
from torchvision.utils import draw_bounding_boxes, make_grid

from defeat_cli.detectors.contract import level_names
from defeat_cli.files import replacing
from defeat_cli.gradients.numbers import concise
from defeat_cli.text import counted

COLORS = matplotlib.colormaps["inferno"]
"""From black to a light yellow, ever lighter: it needs no telling of hues, and survives a grey print."""
DIMMING = 0.4
"""Lightness of the grey image that maps are thrown upon."""
BOX_COLOR = "#38d9f5"
"""Cyan: the colour map has none of it, and few photographs have."""
INSIDE_COLOR, OUTSIDE_COLOR, NOTE_COLOR = "#ed6925", "#8a8a8a", "#444444"

DPI = 110
NARROWEST, WIDEST, PANEL = 8.0, 14.0, 2.5
"""Inches: widths of pictures, and the side of a square panel where there is room; others have its area."""
CAPTION, GAP = 22, 4
"""Pixels of a contact sheet: height of a line of caption, and between pictures."""
PANEL_PIXELS = 600
"""Longer side that panels are drawn at: more than is shown, for even box outlines."""


@dataclass(frozen=True)
class View:
    """An image as the network saw it.

    pixels: [3, h, w] uint8, the image's own area.
    boxes: [M, 4] xyxy in these pixels.
    """

    pixels: Tensor
    boxes: Tensor

    @cached_property
    def backdrop(self) -> np.ndarray:
        """[h, w, 3] float in [0, 1]: the image in dim grey, over which colour stands out."""
        return DIMMING / 255 * rgb_to_grayscale(self.pixels, 3).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Scale:
    """What colours mean.

    norm: from values to [0, 1]; at 0 the image shows through, at 1 the colour is brightest.
    unit: as the picture states it.
    strength: how strongly the brightest colour covers the image, in [0, 1].
    """

    norm: Normalize
    unit: str
    strength: float = 1.0

    def light(self, values: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
        """[h, w] values as coloured light on a [h, w, 3] backdrop: next to none at zero. Both in [0, 1]."""
        return backdrop + (1 - backdrop) * self.strength * COLORS(self.norm(values))[..., :3]

    @property
    def ticks(self) -> dict[str, Any]:
        """How a colour bar marks values; decades have marks of their own."""
        if isinstance(self.norm, AsinhNorm):
            return {}
        exponent = ScalarFormatter(useMathText=True)
        exponent.set_powerlimits((-2, 3))
        return {"ticks": MaxNLocator(5, steps=[1, 2, 5, 10]), "format": exponent}

    @property
    def key(self) -> ScalarMappable:
        """The colours as panels show them, over the grey of a middling image; for a colour bar."""
        steps = self.norm.inverse(np.linspace(0, 1, 256))
        return ScalarMappable(self.norm, ListedColormap(self.light(steps, np.full((256, 3), DIMMING / 2))))


@dataclass(frozen=True)
class Panel:
    """One map over the image.

    values: [h, w], one non-negative value a cell; cells may reach over the image's edge.
    stride: pixels that a cell measures.
    boxes: [M, 4], those to outline.
    """

    title: str
    values: np.ndarray
    stride: int
    boxes: Tensor


@dataclass(frozen=True)
class Row:
    """Maps that belong together, e.g. one detector's; with their `map_numbers`, for a chart of the levels' means."""

    name: str
    panels: list[Panel]
    numbers: dict[str, dict[str, Any]] | None = None


def level_panels(maps: Sequence[np.ndarray], strides: Sequence[int], boxes: Sequence[Tensor]) -> list[Panel]:
    """A panel a level, with the boxes to outline on each."""
    titles = [f"{name} · stride {stride}" for name, stride in zip(level_names("P", strides), strides, strict=True)]
    return [Panel(*panel) for panel in zip(titles, maps, strides, boxes, strict=True)]


def sum_over_levels(maps: Sequence[np.ndarray], strides: Sequence[int]) -> np.ndarray:
    """Sum of [h_l, w_l] maps at the finest level's resolution: a cell adds its value to each finest cell it covers."""
    return sum(
        at_resolution(values, stride, maps[0].shape, strides[0]) for values, stride in zip(maps, strides, strict=True)
    )


def at_resolution(values: np.ndarray, stride: int, shape: tuple[int, int], step: int = 1) -> np.ndarray:
    """A map of cells of `stride` pixels, looked up every `step` pixels; nothing is smoothed: cells stay visible."""
    rows, columns = (
        np.minimum(np.arange(wanted) * step // stride, cells - 1)
        for wanted, cells in zip(shape, values.shape, strict=True)
    )
    return values[rows[:, None], columns]


def common_scale(maps: Iterable[np.ndarray], unit: str, decades: bool) -> Scale:
    """One scale for all maps, up to what at most one cell in 100 exceeds on any: a hot cell would leave the rest dark.

    Args:
        decades: colours follow the logarithm of the value over three decades, and reach zero below them; else its
            square root, which brings out what is weak.
    """
    maps = list(maps)
    top = max(float(np.quantile(values, 0.99)) for values in maps) or max(float(v.max()) for v in maps) or 1.0
    norm = AsinhNorm(top / 1000, 0, top, clip=True) if decades else PowerNorm(0.5, 0, top, clip=True)
    return Scale(norm, f"{unit}\n{'logarithmic' if decades else 'square root'} scale, one for all panels")


def overlay(view: View, panel: Panel, scale: Scale) -> Tensor:
    """[3, h, w] uint8: the panel's map over the image; what of it reaches over the image's edge is cut away."""
    lit = scale.light(at_resolution(panel.values, panel.stride, view.pixels.shape[1:]), view.backdrop)
    return torch.from_numpy((255 * lit).round().astype(np.uint8)).permute(2, 0, 1)


def draw_panels(view: View, rows: Sequence[Row], scale: Scale, path: Path, *, heading: str, note: str) -> None:
    """Write one picture: the image with its boxes, and maps over it.

    Args:
        rows: a single row is broken into two lines; several are put under each other, for comparison.
        heading: what is shown; note: how to read it, small below.
        path: a .png file, replaced whole.
    """
    counts = [1 + len(row.panels) + (row.numbers is not None) for row in rows]
    lines, columns = (len(rows), max(counts)) if len(rows) > 1 else (2, math.ceil(counts[0] / 2))
    ratio = math.sqrt(view.pixels.shape[2] / view.pixels.shape[1])
    side = min(PANEL, WIDEST / columns / ratio)
    figure = new_figure(columns * side * ratio + 0.6, lines * (side / ratio + 0.3) + 1.6, heading, note)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    charts: list[Axes] = []
    for row, places in zip(rows, map(iter, grid if len(rows) > 1 else [grid.flat]), strict=True):
        image = next(places)
        image.set_ylabel(row.name if len(rows) > 1 else "", size=11, weight="bold")
        draw_pixels(image, view.pixels, view.boxes, f"image, {counted(len(view.boxes), 'box')}")
        for panel in row.panels:
            draw_pixels(next(places), overlay(view, panel, scale), panel.boxes, panel.title)
        if row.numbers:
            charts.append(next(places))
            draw_means(charts[-1], row.numbers)
            charts[-1].set_box_aspect(1 / ratio**2)
            charts[-1].sharey(charts[0])
    if charts:
        low, high = (math.log10(limit) for limit in charts[0].get_ylim())
        charts[0].set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
        dots, labels = charts[0].get_legend_handles_labels()
        place = {"loc": "lower right", "bbox_to_anchor": (1, 0.6 / figure.get_figheight())}  # beside the colour bar
        figure.legend(dots, labels, ncols=2, fontsize=9, frameon=False, **place)
    bar = figure.colorbar(scale.key, ax=grid, location="bottom", shrink=0.5, aspect=50, anchor=(0, 0), **scale.ticks)
    bar.set_label(scale.unit, loc="left", size=9)
    save_figure(figure, path)


def draw_pixels(
    axes: Axes, pixels: Tensor, boxes: Tensor, title: str, color: str = BOX_COLOR, side: int = PANEL_PIXELS
) -> None:
    """An image [3, h, w] uint8 with boxes [M, 4] in its pixels, below a title; side: longer one that it is drawn at."""
    axes.imshow(_outlined(pixels, boxes, side, width=2, color=color).permute(1, 2, 0).numpy())
    axes.set_title(title, size=10, loc="left")


def draw_means(axes: Axes, numbers: dict[str, dict[str, Any]], outside_color: str = OUTSIDE_COLOR) -> None:
    """Dots on a log axis: levels differ by orders of magnitude, and what matters is the ratio of two dots."""
    levels = [level for level in numbers if level != "overall"]
    places = np.arange(len(levels))
    inside, outside = (
        np.array([numbers[level][group]["mean"] or np.nan for level in levels])
        for group in ("foreground", "background")
    )
    axes.set_yscale("log")
    axes.vlines(places, inside, outside, color="#c8c8c8", linewidth=3, zorder=1)
    axes.scatter(places, inside, 40, INSIDE_COLOR, label="inside boxes", zorder=3)
    axes.scatter(places, outside, 40, outside_color, label="outside", zorder=2)
    for place, top, ratio in zip(places, np.maximum(inside, outside), inside / outside, strict=True):
        if not math.isnan(ratio):
            label = f"×{concise(ratio)}"
            axes.annotate(label, (place, top), (0, 5), textcoords="offset points", ha="center", size=7.5)
    axes.set_xticks(places, levels)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    axes.tick_params(labelsize=8, length=0)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("mean per cell", size=10, loc="left")


def _outlined(pixels: Tensor, boxes: Tensor, side: int, width: int = 1, color: str = BOX_COLOR) -> Tensor:
    """[3, h, w] uint8 resized to a longer side of so many pixels, with its boxes."""
    factor = side / max(pixels.shape)
    sized = resize(pixels, [max(1, round(side * factor)) for side in pixels.shape[1:]])
    return draw_bounding_boxes(sized, boxes * factor, colors=color, width=width) if len(boxes) else sized


def thumbnails(view: View, panels: Sequence[Panel], scale: Scale, side: int) -> Tensor:
    """[3, h, w] uint8: the image beside its maps, each within a square of `side` pixels, all with the image's boxes."""
    pictures = [view.pixels, *(overlay(view, panel, scale) for panel in panels)]
    return torch.cat([F.pad(_outlined(pixels, view.boxes, side), (0, GAP), value=255) for pixels in pictures], dim=2)


def draw_contact_sheet(strips: Sequence[Tensor], captions: Sequence[str], path: Path, heading: str, note: str) -> None:
    """Write many images' `thumbnails` on one sheet; heading: what is shown; note: how to read it, small below."""
    height, width = (max(strip.shape[side] for strip in strips) for side in (1, 2))
    columns = max(1, round(math.sqrt(1.4 * len(strips) * height / width)))
    room = [F.pad(s, (0, width - s.shape[2], 0, height - s.shape[1] + CAPTION), value=255) for s in strips]
    sheet = make_grid(room, nrow=columns, padding=GAP, pad_value=255).permute(1, 2, 0).numpy()
    figure = new_figure(sheet.shape[1] / DPI, sheet.shape[0] / DPI + 0.9, heading, note)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.imshow(sheet)
    for i, caption in enumerate(captions):
        row, column = divmod(i, columns)
        place = GAP + column * (width + GAP), (row + 1) * (height + CAPTION + GAP)
        axes.text(*place, shortened(caption, width // 7), size=8, va="bottom", parse_math=False)
    save_figure(figure, path)


def shortened(text: str, most: int) -> str:
    """The text with its middle left out where it has more letters than `most`."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) :]}"


def new_figure(width: float, height: float, heading: str, note: str) -> Figure:
    """A figure of so many inches or a little wider, with its heading above and its note below."""
    width = max(width, NARROWEST)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="compressed")
    figure.get_layout_engine().set(h_pad=0.08)
    # Matplotlib's own wrapping takes `$` in file names for formulas.
    left = {"x": 0.01, "ha": "left", "parse_math": False}
    figure.suptitle(textwrap.fill(heading, int(8.5 * width)), size=12, weight="bold", **left)
    figure.supxlabel(textwrap.fill(note, int(12.5 * width)), size=9, color=NOTE_COLOR, **left)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary, warnings.catch_warnings():
        # A name in a script that the font has not is drawn as boxes; the picture is worth having all the same.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(temporary, pil_kwargs={"optimize": True})
