"""Detections drawn on their image: a box each, with name and score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#0072b2")
"""Okabe and Ito's, which people tell apart whose sight of colours is weak. A class of its own has one, in turn."""

SMALLEST = 480
"""Pixels of the long side of a picture; smaller images are enlarged by a whole factor, for names to be read."""

LETTERS, LINES = 45, 300
"""Height of letters and width of lines are the picture's long side over these."""


def draw(image: Tensor, boxes: Tensor, texts: Sequence[str], kinds: Sequence[int]) -> Image.Image:
    """A picture of an image with its detections, the first on top.

    Args:
        image: [3, H, W] uint8.
        boxes: [M, 4] xyxy, pixels of the image.
        texts: what to write at each box.
        kinds: a number for each box that decides its colour.
    """
    factor = math.ceil(SMALLEST / max(image.shape[-2:]))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    drawing = ImageDraw.Draw(picture)
    font = _font(picture)
    line = max(2, max(picture.size) // LINES)
    places = (boxes * factor).round().to(torch.int64).tolist()
    for (left, top, right, bottom), text, kind in reversed(list(zip(places, texts, kinds, strict=True))):
        color = COLORS[kind % len(COLORS)]
        drawing.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=line)
        _label(drawing, picture, (left, top), text, color, font)
    return picture


def _label(
    drawing: ImageDraw.ImageDraw,
    picture: Image.Image,
    corner: tuple[int, int],
    text: str,
    color: str,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Text on its colour over the top left corner of a box, or within the box where the picture ends above it."""
    _, _, width, height = drawing.textbbox((0, 0), text, font=font)
    left = max(0, min(corner[0], picture.width - width - 4))
    top = corner[1] - height - 4 if corner[1] >= height + 4 else corner[1]
    drawing.rectangle((left, top, left + width + 4, top + height + 4), fill=color)
    drawing.text((left + 2, top + 2), text, font=font, fill="white" if color == "#0072b2" else "black")


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures of one size in a row, a title over each."""
    width, height = pictures[0].size
    font = _font(pictures[0])
    head = int(font.size * 1.8)
    gap = max(4, width // 100)
    whole = Image.new("RGB", (len(pictures) * (width + gap) - gap, height + head), "white")
    drawing = ImageDraw.Draw(whole)
    for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left = column * (width + gap)
        while len(title) > 1 and drawing.textlength(title, font=font) > width:
            title = "…" + title.lstrip("…")[1:]  # the end of a path tells more than its beginning
        drawing.text((left + 2, font.size * 0.3), title, font=font, fill="black")
        whole.paste(picture, (left, head))
    return whole


def one_below_the_other(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a column, on white where one is narrower than another."""
    gap = max(4, pictures[0].width // 100)
    height = sum(picture.height + gap for picture in pictures) - gap
    whole = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height + gap
    return whole


def _font(picture: Image.Image) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), max(12, max(picture.size) // LETTERS))
