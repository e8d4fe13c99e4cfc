"""Examples as SVG: each image is in the page once, and boxes lie over it, sharp at any size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from markupsafe import Markup, escape
from PIL import Image

from defeat_cli.pages.examples import Boxes, Example
from defeat_cli.text import counted

LONG_SIDE, QUALITY = 480, 82
"""Pixels that a larger image is shrunk to, and JPEG's quality."""
COLORS = 7
"""Classes have colours in turn; base.css has as many."""


def image_source(example: Example) -> Markup:
    """The image as a data URI."""
    picture = Image.fromarray(example.image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((LONG_SIDE, LONG_SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    return Markup("data:image/jpeg;base64,") + base64.b64encode(content.getvalue()).decode()


def defined(example: Example, id: str) -> Markup:
    """The image under an id, for `overlaid` to use."""
    height, width = example.image.shape[-2:]
    return Markup('<image id="{}" width="{}" height="{}" preserveAspectRatio="none" href="{}"/>').format(
        id, width, height, image_source(example)
    )


def overlaid(example: Example, boxes: Boxes, id: str, classes: Sequence[str], what: str) -> Markup:
    """A defined image with boxes, names and scores; detections that are wrong are dashed.

    Args:
        classes: all names there are, whose places decide colours.
        what: whose boxes these are, for those who cannot see the picture.
    """
    height, width = example.image.shape[-2:]
    size = max(height, width) / 26
    parts = []
    for i in reversed(range(len(boxes.names))):  # the best on top
        left, top, right, bottom = (round(side, 1) for side in boxes.corners[i].tolist())
        name = boxes.names[i]
        color = f"c{classes.index(name) % COLORS}" if name in classes else "c0"
        wrong = boxes.right is not None and not boxes.right[i]
        score = f" {boxes.scores[i]:.2f}" if boxes.scores is not None else ""
        parts.append(
            f'<g class="{color}{" wrong" if wrong else ""}">'
            f"<title>{escape(name)}{score}{', wrong' if wrong else ''}</title>"
            f'<rect x="{left}" y="{top}" width="{round(max(0, right - left), 1)}" '
            f'height="{round(max(0, bottom - top), 1)}"/>'
            f'<text x="{left}" y="{round(max(size, top - size / 4), 1)}">{escape(name)}{score}</text></g>'
        )
    label = f"{example.name}: {counted(len(boxes.names), 'box')} of {what}"
    return Markup(
        f'<svg class="picture" viewBox="0 0 {width} {height}" font-size="{size:.1f}" role="img" '
        f'aria-label="{escape(label)}"><use href="#{id}"/>{"".join(parts)}</svg>'
    )
