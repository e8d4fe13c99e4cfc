"""What gradient maps say of foreground and background, per image and over many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defeat_cli.distillation.masks import box_masks


def cells_of_boxes(
    boxes: Tensor, shapes: Sequence[tuple[int, int]], strides: Sequence[int], finest_scale: float | None = None
) -> list[Tensor]:
    """Cells inside each box, one [M, h, w] bool a level.

    Args:
        boxes: [M, 4] xyxy in network-input pixels.
        finest_scale: None marks every box on every level: inside and outside of objects, wherever they are learned. A
            number marks each box on its own level only, as the distillation mask does.
    """
    if not len(boxes):
        return [torch.zeros(0, *shape, dtype=torch.bool, device=boxes.device) for shape in shapes]
    apart = list(boxes.split(1))
    if finest_scale is not None:
        return box_masks(apart, list(shapes), list(strides), finest_scale)
    return [box_masks(apart, [shape], [stride])[0] for shape, stride in zip(shapes, strides, strict=True)]


def own_area(maps: Sequence[Tensor], size: tuple[int, int], strides: Sequence[int]) -> list[np.ndarray]:
    """[h, w] maps without the cells that begin in the padding; size: (height, width) of the image's own area."""
    return [
        values[: -(-size[0] // stride), : -(-size[1] // stride)].cpu().numpy()
        for values, stride in zip(maps, strides, strict=True)
    ]


def split_numbers(values: np.ndarray, foreground: np.ndarray) -> dict[str, Any]:
    """What a map says of foreground and background.

    Args:
        values: [n] magnitudes of the cells of the image's own area.
        foreground: [n] bool.

    Returns:
        `foreground` and `background`: `cells`, `mean`, `median`; `ratio` of the means; `foreground_share` of the summed
        magnitude, beside `foreground_area`, its share of the cells. None where there is nothing to divide by.
    """
    groups = {}
    for name, mask in (("foreground", foreground), ("background", ~foreground)):
        cells = values[mask]
        groups[name] = {
            "cells": int(cells.size),
            "mean": float(cells.mean()) if cells.size else None,
            "median": float(np.median(cells)) if cells.size else None,
        }
    return {
        **groups,
        "ratio": _ratio(groups["foreground"]["mean"], groups["background"]["mean"]),
        "foreground_share": _ratio(float(values[foreground].sum()), float(values.sum())),
        "foreground_area": float(foreground.mean()),
    }


def map_numbers(
    maps: Sequence[np.ndarray], foreground: Sequence[np.ndarray], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`split_numbers` by level, and `overall` over the cells of all levels together.

    Args:
        maps, foreground: one [h, w] a level, of the image's own area, without padding.
        names: of the levels, each another.
    """
    flat = [(values.ravel(), mask.ravel()) for values, mask in zip(maps, foreground, strict=True)]
    flat.append(tuple(np.concatenate(parts) for parts in zip(*flat, strict=True)))
    return {name: split_numbers(*cells) for name, cells in zip([*names, "overall"], flat, strict=True)}


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def concise(ratio: float) -> str:
    """A ratio in as many digits as it deserves: `0.85`, `3.2`, `41`."""
    return f"{ratio:.{2 if ratio < 0.995 else 1 if ratio < 9.95 else 0}f}"


FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "foreground_mean": lambda numbers: numbers["foreground"]["mean"],
    "background_mean": lambda numbers: numbers["background"]["mean"],
    "foreground_median": lambda numbers: numbers["foreground"]["median"],
    "background_median": lambda numbers: numbers["background"]["median"],
    "foreground_share": lambda numbers: numbers["foreground_share"] or 0.0,
    "foreground_area": lambda numbers: numbers["foreground_area"],
    "foreground_higher": lambda numbers: float(numbers["foreground"]["mean"] > numbers["background"]["mean"]),
}
"""What is averaged over images: a figure's name, and the figure of one image's `split_numbers`."""


def summarize(
    images: Sequence[dict[str, dict[str, Any]]], seed: int = 0, resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """Over all images, by level: the mean of each of `FIGURES`, with a 95% interval from resampling the images.

    Images without foreground or without background cells say nothing of a comparison and are left out; `images` counts
    the rest. `foreground_higher` is the share of images whose foreground mean is above their background mean; `ratio`
    is that of the two means. Intervals are None for fewer than two images, or where a denominator can be 0.

    Args:
        images: what `map_numbers` gives, one an image.
        seed: fixes the resampling.
    """
    levels = images[0] if images else {}
    return {level: _summary([numbers[level] for numbers in images], seed, resamples) for level in levels}


def _summary(images: list[dict[str, Any]], seed: int, resamples: int) -> dict[str, Any]:
    compared = [numbers for numbers in images if numbers["foreground"]["cells"] and numbers["background"]["cells"]]
    count = len(compared)
    if not count:
        return {"images": 0}
    table = np.array([[figure(numbers) for figure in FIGURES.values()] for numbers in compared])
    generator = np.random.default_rng(seed)
    draws = np.stack([table[generator.integers(0, count, count)].mean(axis=0) for _ in range(resamples)])
    means = dict(zip(FIGURES, table.mean(axis=0).tolist(), strict=True))
    drawn = dict(zip(FIGURES, draws.T, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn["ratio"] = drawn["foreground_mean"] / drawn["background_mean"]
    means["ratio"] = _ratio(means["foreground_mean"], means["background_mean"])
    figures = {name: {"mean": means[name], "interval": _interval(drawn[name], count)} for name in means}
    return {"images": count, **figures}


def _interval(draws: np.ndarray, images: int) -> list[float] | None:
    """Middle 95% of bootstrap draws."""
    if images < 2 or not np.isfinite(draws).all():
        return None
    return [float(bound) for bound in np.quantile(draws, [0.025, 0.975])]
