"""How well anchors fit the boxes of a data set, and anchor sizes that fit better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from defeat_cli.data.dataset import DetectionDataset

GOOD_FIT = 0.55
"""RetinaNet takes anchors from IoU 0.5 on, the RPN from 0.7 on or the best: below this most boxes have few."""
WORTH_SAYING = 0.03
MOST_BOXES = 20_000
"""So many boxes, spread evenly over all, decide; more change the figures in the third place."""
ROUNDS = 100
STEPS = range(-2, 9)
"""Pyramids that are tried: the finest level's anchors have 2^(step / 2) times its stride."""
PADDING = 32
"""Batches are padded to multiples of this, and the grid of anchors covers the padding."""


@dataclass(frozen=True)
class Level:
    """The anchors of one feature level. shapes: [A, 2] width and height in pixels of the network's input."""

    stride: int
    shapes: np.ndarray


@dataclass(frozen=True)
class Boxes:
    """Boxes as the network sees them. corners: [M, 4] xyxy; limits: [M, 2] width and height of each one's image."""

    corners: np.ndarray
    limits: np.ndarray

    @property
    def sides(self) -> np.ndarray:
        """[M, 2] width and height."""
        return self.corners[:, 2:] - self.corners[:, :2]


@dataclass(frozen=True)
class Fit:
    """mean: over boxes, of the best IoU that an anchor has with them. sizes: anchor sizes, a list for each level, that
    would have `better` for it; None where the anchors fit well, or no others fit much better."""

    mean: float
    sizes: list[list[float]] | None = None
    better: float | None = None

    @property
    def bad(self) -> bool:
        """Whether most boxes have few anchors."""
        return self.mean < GOOD_FIT

    def in_words(self) -> str:
        """How good the fit is and, where it is bad, what to do about it."""
        iou = f"the best anchor of a box has an IoU of {self.mean:.2f} with it on average"
        if not self.bad:
            return iou
        if self.sizes is None:
            return f"{iou}. No other sizes do much better; a larger data.short_side or student.anchor_ratios may"
        sizes = ",".join("[" + ",".join(f"{side:g}" for side in level) + "]" for level in self.sizes)
        return (
            f"the student's anchors fit the boxes badly: {iou}. --set student.anchor_sizes=[{sizes}] has "
            f"{self.better:.2f}"
        )


def input_boxes(data: DetectionDataset, short_side: int, long_side: int) -> Boxes:
    """Boxes to learn from, scaled as images are: to a short side, with the long one at `long_side` at most.

    Evenly spread ones where there are more than `MOST_BOXES`.
    """
    corners, images = data.boxes
    chosen = np.unique(np.linspace(0, len(corners) - 1, min(len(corners), MOST_BOXES)).astype(np.int64))
    sizes = np.array(data.sizes, dtype=np.float64).reshape(-1, 2)[images[chosen]][:, ::-1]
    scale = np.minimum(short_side / sizes.min(axis=1), long_side / sizes.max(axis=1))
    limits = np.floor(sizes * scale[:, None])
    return Boxes(corners[chosen] * np.tile(limits / sizes, 2), limits)


def best_overlaps(boxes: Boxes, levels: Sequence[Level]) -> np.ndarray:
    """[M] the best IoU that any anchor has with each box.

    Anchors stand around the points (i·stride, j·stride). For one shape the nearest point is the best, as the overlap
    falls with either distance.
    """
    centres, sides = (boxes.corners[:, :2] + boxes.corners[:, 2:]) / 2, boxes.sides
    areas = sides.prod(axis=1)
    best = np.zeros(len(sides))
    for level in levels:
        cells = np.ceil(np.ceil(boxes.limits / PADDING) * PADDING / level.stride)
        nearest = (centres / level.stride).round().clip(0, cells - 1) * level.stride
        distance = np.abs(centres - nearest)
        for shape in level.shapes:
            shared = np.minimum((sides + shape) / 2 - distance, np.minimum(sides, shape)).clip(0).prod(axis=1)
            best = np.maximum(best, shared / (areas + shape.prod() - shared))
    return best


def anchor_shapes(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """[sizes · ratios, 2] width and height of anchors; a ratio is height to width."""
    roots = np.sqrt(np.asarray(ratios, dtype=np.float64))
    sides = np.stack([1 / roots, roots], axis=1)
    return (np.asarray(sizes, dtype=np.float64)[:, None, None] * sides).reshape(-1, 2)


def better_sizes(boxes: Boxes, levels: int, a_level: int, ratios: Sequence[float]) -> list[list[float]]:
    """Anchor sizes for each level, finest first, by k-means over the boxes.

    The distance of a box to a size is 1 − IoU with the best of its anchors, both centred at one point. A size becomes
    the geometric mean of its boxes' (the root of their areas), until nothing changes. It begins with quantiles, so
    nothing is random.
    """
    sides = boxes.sides
    own = np.sqrt(sides.prod(axis=1))
    sizes = np.quantile(own, (np.arange(levels * a_level) + 0.5) / (levels * a_level))
    for _ in range(ROUNDS):
        shapes = anchor_shapes(sizes, ratios)
        shared = np.minimum(sides[:, None], shapes).prod(axis=2)
        overlaps = shared / (own[:, None] ** 2 + shapes.prod(axis=1) - shared)
        nearest = overlaps.argmax(axis=1) // len(ratios)
        moved = [np.exp(np.log(own[nearest == k]).mean()) if (nearest == k).any() else s for k, s in enumerate(sizes)]
        if np.allclose(moved, sizes, rtol=1e-3):
            break
        sizes = np.array(moved)
    rounded = [max(1.0, float(round(size))) for size in np.sort(sizes)]
    return [rounded[i * a_level : (i + 1) * a_level] for i in range(levels)]


def fit(boxes: Boxes, levels: Sequence[Level], ratios: Sequence[float]) -> Fit:
    """How well the anchors of some levels fit, and sizes that fit better where they fit badly.

    Offered are the best of those that k-means finds, which knows no strides, and of pyramids, whose sizes grow as the
    strides do.
    """
    overlaps = best_overlaps(boxes, levels)
    mean = float(overlaps.mean()) if len(overlaps) else 1.0
    if mean >= GOOD_FIT:
        return Fit(mean)
    strides, a_level = [level.stride for level in levels], max(1, len(levels[0].shapes) // len(ratios))
    offers = [better_sizes(boxes, len(levels), a_level, ratios)]
    offers += [pyramid(strides[0] * 2 ** (step / 2), strides, a_level) for step in STEPS]

    def overlap(sizes: list[list[float]]) -> float:
        offered = [Level(stride, anchor_shapes(own, ratios)) for stride, own in zip(strides, sizes, strict=True)]
        return float(best_overlaps(boxes, offered).mean())

    better, sizes = max(((overlap(sizes), sizes) for sizes in offers), key=lambda offer: offer[0])
    return Fit(mean, sizes, better) if better > mean + WORTH_SAYING else Fit(mean)


def pyramid(finest: float, strides: Sequence[int], a_level: int) -> list[list[float]]:
    """Anchor sizes that grow as the strides do, in whole pixels; those of a level share out an octave."""
    octaves = [2 ** (i / a_level) for i in range(a_level)]
    return [[max(1.0, float(round(finest * s / strides[0] * octave))) for octave in octaves] for s in strides]
