"""A picture of what is suspicious: one tile an image, its boxes at fault drawn on it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from defeat_cli.data.faults import Fault, ImageError
from defeat_cli.data.transforms import read_image

TILE, CAPTION, GAP = 240, 30, 8
ACROSS = 4
OF_A_KIND = 8
"""Tiles of one rule at most: a thousand boxes of one kind are not to hide what else there is."""
PAPER, INK, AT_FAULT, NOTHING = "white", "black", "#e0202a", "#d8d8d8"


def draw_sheet(groups: Sequence[tuple[str, str, list[Fault]]]) -> tuple[Image.Image, int]:
    """Draw the faults that are about images.

    Args:
        groups: rule, split, and faults of that kind, in the order in which they are drawn.

    Returns:
        The picture, and how many tiles it has.
    """
    tiles = [
        _tile(image, faults, f"{rule} ({split})")
        for rule, split, found in groups
        for image, faults in islice(_by_image(found).items(), OF_A_KIND)
    ]
    rows = -(-len(tiles) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (TILE + GAP) + GAP, rows * (TILE + CAPTION + GAP) + GAP), PAPER)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, ACROSS)
        sheet.paste(tile, (GAP + column * (TILE + GAP), GAP + row * (TILE + CAPTION + GAP)))
    return sheet, len(tiles)


def _by_image(faults: Sequence[Fault]) -> dict[Path, list[Fault]]:
    of: dict[Path, list[Fault]] = {}
    for fault in faults:
        if fault.image is not None:
            of.setdefault(fault.image, []).append(fault)
    return of


def _tile(path: Path, faults: Sequence[Fault], caption: str) -> Image.Image:
    """An image, made smaller so that it and all boxes at fault fit; a crossed field where it cannot be read."""
    boxes = [fault.box for fault in faults if fault.box is not None]
    tile = Image.new("RGB", (TILE, TILE + CAPTION), PAPER)
    draw = ImageDraw.Draw(tile)
    try:
        # Turned as its boxes are, which the annotated size tells.
        image = Image.fromarray(read_image(path, faults[0].size).permute(1, 2, 0).numpy())
    except ImageError:
        draw.rectangle((0, 0, TILE - 1, TILE - 1), fill=NOTHING)
        draw.line((0, 0, TILE - 1, TILE - 1), fill=AT_FAULT)
        draw.line((0, TILE - 1, TILE - 1, 0), fill=AT_FAULT)
    else:
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4)
        # A box far outside would make the image a dot: it is drawn as far as half an image away.
        sides = np.array(image.size, dtype=np.float64)
        corners = corners.clip(np.tile(-sides / 2, 2), np.tile(sides * 1.5, 2)).reshape(-1, 2)
        low = np.vstack([corners, [0, 0]]).min(axis=0)
        extent = np.vstack([corners, sides]).max(axis=0) - low
        scale = (TILE - 3) / extent.max()
        size = np.maximum(1, (sides * scale).astype(int))
        tile.paste(image.resize(tuple(size.tolist())), tuple((-low * scale).round().astype(int).tolist()))
        for first, second in ((corners - low) * scale).reshape(-1, 2, 2):
            draw.rectangle((*np.minimum(first, second), *np.maximum(first, second)), outline=AT_FAULT, width=2)
    draw.rectangle((0, TILE, TILE, TILE + CAPTION), fill=PAPER)
    for line, text in enumerate((caption, path.name)):
        draw.text((2, TILE + 2 + 13 * line), _drawable(text), fill=INK)
    return tile


def _drawable(text: str) -> str:
    """Pillow's own font knows Latin letters."""
    return text[-38:].encode("latin-1", "replace").decode("latin-1")
