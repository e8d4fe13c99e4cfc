"""What DeFeat keeps apart, in one picture: masks, features of both detectors, their difference, regions of the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.ticker import LogLocator
from torch import Tensor

from defeat_cli.detectors.contract import Detector, RegionClassifier, Regions, level_names
from defeat_cli.distillation.terms import Neck
from defeat_cli.distillation.terms import View as Look
from defeat_cli.gradients import pictures
from defeat_cli.gradients.images import view_of
from defeat_cli.gradients.numbers import map_numbers, own_area
from defeat_cli.gradients.pictures import COLORS, INSIDE_COLOR, View
from defeat_cli.text import counted

BACKGROUND_COLOR = "#3d9bff"
"""Of background, beside the orange of the foreground: the colour-blind tell them apart too."""
MASK_STRENGTH = 0.55
"""How strongly a mask's colours cover the image."""
MOST_REGIONS = 40
"""So many regions of a group are drawn; of more, evenly chosen ones, for all of them would cover the image."""
PANEL, PIXELS = 1.25, 300
"""The side of a square panel, others have its area, in inches; and the longer side that panels are drawn at."""
ROWS = ("mask", "teacher", "student", "difference")
"""What is shown of each level."""
NOTE = (
    "Orange: foreground; blue: background; each has a weight of its own. Teacher, student: length of a cell's "
    "features, the student's in the teacher's channels, one scale a level. Difference: mean square over channels, "
    "which the neck term weighs."
)
HEAD_NOTE = "Both heads classify the teacher's regions."
"""Said where they can, and the regions are shown."""


@torch.no_grad()
def draw_decoupling(student: Look, teacher: Look, term: Neck, path: Path, *, heading: str, seed: int = 0) -> None:
    """Write one picture of what the neck term compares, cell by cell, and of the regions that the head's would.

    Args:
        student, teacher: looks at one image.
        term: with the adapters that take the student's features to the teacher's channels.
        path: a .png file, replaced whole.
        heading: what is shown.
        seed: of the draw of regions.
    """
    view, compared = view_of(student.batch), list(term.compared(student, teacher))
    names = level_names("P", student.detector.strides)
    names, strides, masks = (
        [of_all[level.index] for level in compared]
        for of_all in (names, student.detector.strides, term.masks(student, teacher))
    )

    def own(maps: Sequence[Tensor]) -> list[np.ndarray]:
        return own_area([values[0].float() for values in maps], student.batch.sizes[0], strides)

    inside = own(masks)
    theirs, ours = own([c.teacher.norm(dim=1) for c in compared]), own([c.student.norm(dim=1) for c in compared])
    apart = own([(c.student - c.teacher).square().mean(dim=1) for c in compared])

    ratio = (view.pixels.shape[2] / view.pixels.shape[1]) ** 0.5
    columns = 1 + len(compared)
    heads = _classify_the_same(student.detector, teacher.detector)
    note = f"{NOTE} {HEAD_NOTE}" if heads else NOTE
    figure = pictures.new_figure(columns * PANEL * ratio + 0.5, len(ROWS) * (PANEL / ratio + 0.25) + 1, heading, note)
    grid = figure.subplots(len(ROWS), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    pictures.draw_pixels(grid[0, 0], view.pixels, view.boxes, f"image, {counted(len(view.boxes), 'box')}", side=PIXELS)
    if heads:
        _draw_regions(grid[1:3, 0], view, _regions(student, teacher, seed))
    numbers = map_numbers(apart, [mask > 0.5 for mask in inside], names)
    pictures.draw_means(grid[3, 0], numbers, BACKGROUND_COLOR)
    grid[3, 0].set_box_aspect(1 / ratio**2)
    grid[3, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    grid[3, 0].yaxis.set_major_formatter("{x:g}")
    for axes, name, stride, *maps in zip(grid[:, 1:].T, names, strides, inside, theirs, ours, apart, strict=True):
        _draw_level(axes, view, stride, *maps)
        axes[0].set_title(f"{name} · stride {stride}", size=10, loc="left")
    for axes, name in zip(grid[:, 0], ROWS, strict=True):
        axes.set_ylabel(name, size=11, weight="bold")
    pictures.save_figure(figure, path)


def _draw_level(
    places: Sequence[Axes],
    view: View,
    stride: int,
    mask: np.ndarray,
    theirs: np.ndarray,
    ours: np.ndarray,
    squares: np.ndarray,
) -> None:
    """A level's maps [h, w], one under the other: how much a cell is foreground, features, their squared difference."""
    colors = _in_two_colors(view, mask, stride)
    covered = view.backdrop + (1 - view.backdrop) * MASK_STRENGTH * colors
    pictures.draw_pixels(places[0], _as_pixels(covered), view.boxes[:0], "", side=PIXELS)
    scale = Normalize(min(theirs.min(), ours.min()), max(theirs.max(), ours.max()))
    shown = [COLORS(scale(pictures.at_resolution(m, stride, colors.shape[:2])))[..., :3] for m in (theirs, ours)]
    bright = np.sqrt(squares / (squares.max() or 1.0))
    shown.append(pictures.at_resolution(bright, stride, colors.shape[:2])[..., None] * colors)
    for axes, lit in zip(places[1:], shown, strict=True):
        axes.imshow(lit, interpolation="nearest")  # cells keep their edges


def _as_pixels(lit: np.ndarray) -> Tensor:
    """[h, w, 3] in [0, 1] as [3, h, w] uint8."""
    return torch.from_numpy((255 * lit).round().astype(np.uint8)).permute(2, 0, 1)


def _in_two_colors(view: View, mask: np.ndarray, stride: int) -> np.ndarray:
    """[h, w, 3] in [0, 1], of the image's size: the foreground's colour by as much as a cell is it, else the other."""
    share = pictures.at_resolution(mask, stride, view.pixels.shape[1:])[..., None]
    return share * to_rgb(INSIDE_COLOR) + (1 - share) * to_rgb(BACKGROUND_COLOR)


def _classify_the_same(student: Detector, teacher: Detector) -> bool:
    """Whether both heads can classify the teacher's regions."""
    both = isinstance(student, RegionClassifier) and isinstance(teacher, RegionClassifier)
    return both and student.region_obstacle(teacher) is None


def _regions(student: Look, teacher: Look, seed: int) -> Regions:
    """The teacher's regions, as a training step draws them, in the student's pixels."""
    device = student.batch.pixels.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return teacher.regions_in(student)


def _draw_regions(places: Sequence[Axes], view: View, regions: Regions) -> None:
    """Foreground regions over the dimmed image in one place, background regions in the next."""
    dimmed, labels = _as_pixels(view.backdrop), regions.labels[0]
    for axes, kind, chosen, color in (
        (places[0], "foreground", labels > 0, INSIDE_COLOR),
        (places[1], "background", labels == 0, BACKGROUND_COLOR),
    ):
        boxes = regions.boxes[0][chosen].cpu()
        shown = boxes[torch.linspace(0, len(boxes) - 1, min(len(boxes), MOST_REGIONS)).round().long()]
        pictures.draw_pixels(axes, dimmed, shown, counted(len(boxes), f"{kind} region"), color, PIXELS)
