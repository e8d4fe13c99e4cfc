"""The embedded data set: drawn scenes of six kinds of shapes among clutter, as COCO files on disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from defeat_cli.errors import DataError

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
SETTINGS = "shapes.json"
VERSION = 1
"""Raise it when the same settings would draw other images."""

FINE = 4
"""Scenes are drawn so many times larger and averaged down: smooth edges, and boxes to a quarter of a pixel."""
SIDES = (0.08, 0.95)
"""Smallest and largest object, as a share of the image's side."""
MAX_OBJECTS = 6
EMPTY_CHANCE = 0.04
VISIBLE = 0.35
"""Objects of which less than this share is seen, behind others or past the border, are not annotated."""
TYPICAL = 0.75
"""How often an object has the colour of its kind, as real things often do; it makes small data enough to learn from."""

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""xyxy in pixels of the image."""


def draw_shapes(folder: Path, train_images: int = 800, val_images: int = 200, size: int = 128, seed: int = 0) -> Path:
    """Draw the data set in the simple layout (`train.json`, `val.json`, `images/`), or take it where it is already.

    Boxes are tight around what is seen of an object. Image i of a split depends on (seed, split, i, size) alone.

    Args:
        size: side of the square images, pixels.

    Returns:
        The folder.

    Raises:
        DataError: the folder holds something else, or shapes with other settings.
    """
    settings = {
        "version": VERSION, "train_images": train_images, "val_images": val_images, "size": size, "seed": seed
    }  # fmt: skip
    if _is_drawn(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (temporary / "images").mkdir()
        for number, (split, count) in enumerate((("train", train_images), ("val", val_images))):
            _draw_split(temporary, split, number, count, size, seed)
        (temporary / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        try:
            os.rename(temporary, folder)
        except OSError:
            if not _is_drawn(folder, settings):  # another process may have drawn the same meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_drawn(folder: Path, settings: dict[str, int]) -> bool:
    """Whether the folder holds these very shapes; False where it is empty or not there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(
            f"{folder}: holds something other than drawn shapes, which data.format: shapes draws into a new or empty "
            "folder. To train on what is there, leave --recipe out or take a recipe without that line "
            f"(quickstart has it): defeat train --data {folder}"
        ) from None
    if found != settings:
        found = found if isinstance(found, dict) else {}
        other = ", ".join(f"{k} {found.get(k)} instead of {v}" for k, v in settings.items() if found.get(k) != v)
        raise DataError(f"{folder}: holds shapes drawn with other settings ({other}); name another folder or delete it")
    return True


def _draw_split(folder: Path, split: str, number: int, count: int, size: int, seed: int) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        image, objects = draw_scene(np.random.default_rng((seed, number, i)), size)
        name = f"{split}_{i:05d}.png"
        # Noise hardly shrinks: compressed, a file is a third smaller and takes three times as long to read.
        image.save(folder / "images" / name, compress_level=0)
        images.append({"id": i + 1, "file_name": name, "width": size, "height": size})
        for kind, (x1, y1, x2, y2) in objects:
            width, height = x2 - x1, y2 - y1
            annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": kind + 1, "iscrowd": 0}
            annotations.append({**annotation, "bbox": [x1, y1, width, height], "area": width * height})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def draw_scene(rng: np.random.Generator, size: int) -> tuple[Image.Image, list[tuple[int, Box]]]:
    """One scene.

    Returns:
        The image, and for each annotated object its index in `CLASSES` and its box.
    """
    scene = _Scene(rng, size)
    for _ in range(rng.integers(1, 4)):
        scene.add_clutter()
    count = 0 if rng.random() < EMPTY_CHANCE else int(rng.integers(1, MAX_OBJECTS + 1))
    for side in np.sort(_log_uniform(rng, *SIDES, count))[::-1]:  # large ones first, or they would hide the small
        scene.add_object(float(side) * size * FINE / 2)
        if rng.random() < 0.15:
            scene.add_clutter()
    return scene.photograph(), scene.visible_objects()


class _Scene:
    """A canvas FINE times the image's size, beside it a map of which object is seen where (0: none)."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.side = size * FINE
        self.hue = rng.random()
        self.canvas = self._background()
        self.owners = Image.new("L", (self.side, self.side))
        self.kinds: list[int] = []
        self.areas: list[int] = []
        self.circles: list[tuple[float, float, float]] = []

    def add_object(self, radius: float) -> None:
        """Draw one object of a random kind, overlapping earlier ones a little at most."""
        rng = self.rng
        margin = radius / 2
        for _ in range(8):
            x, y = rng.uniform(margin, self.side - margin, 2)
            if all(math.hypot(x - u, y - v) > 0.75 * max(radius, r) for u, v, r in self.circles):
                break
        self.circles.append((x, y, radius))
        kind = int(rng.integers(len(CLASSES)))
        stretch = np.array([rng.uniform(0.85, 1.0), 1.0]) * radius
        turn = _rotation(rng.uniform(-0.4, 0.4))
        rings = [(ring * stretch) @ turn + (x, y) for ring in _outline(CLASSES[kind], rng)]
        self.kinds.append(kind)
        self.areas.append(self._paint(rings, owner=len(self.kinds), hue=kind / len(CLASSES)))

    def add_clutter(self) -> None:
        """Draw something that is no object: a blob, a half disc, or a bent line."""
        rng = self.rng
        center = rng.uniform(0, 1, 2) * self.side
        radius = _log_uniform(rng, 0.03, 0.25) * self.side
        angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        what = rng.integers(3)
        if what == 0:
            waves = sum(rng.uniform(-0.3, 0.3) * np.cos(k * angles + rng.uniform(0, 6.3)) for k in (2, 3, 5))
            points = radius * (1 + waves)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        elif what == 1:
            points = radius * np.stack([np.cos(angles / 2), np.sin(angles / 2)], 1)
        else:
            bend = np.linspace(-1, 1, 20)
            spine = np.stack([bend * 2.5, rng.uniform(-1, 1) * bend**2], 1) * radius
            width = (0, rng.uniform(0.01, 0.03) * self.side)
            points = np.concatenate([spine, (spine + width)[::-1]])
        self._paint([points @ _rotation(rng.uniform(0, 2 * math.pi)) + center], owner=0)

    def visible_objects(self) -> list[tuple[int, Box]]:
        """Kind of each object that is seen well enough, and the tight box of what is seen of it."""
        owners = np.asarray(self.owners)
        objects = []
        for owner, (kind, area) in enumerate(zip(self.kinds, self.areas, strict=True), start=1):
            seen = owners == owner
            if np.count_nonzero(seen) >= VISIBLE * area:
                columns, rows = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
                corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                objects.append((kind, tuple(float(corner) / FINE for corner in corners)))
        return objects

    def photograph(self) -> Image.Image:
        """The scene at its final size, unevenly lit, a little blurred and noisy."""
        rng = self.rng
        image = self.canvas.reduce(FINE)
        if rng.random() < 0.4:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels * (1 + 0.35 * (_ramp(rng, len(pixels)) - 0.5)[..., None])
        noise = rng.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(2, 8)
        return Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))

    def _paint(self, rings: list[np.ndarray], owner: int, hue: float | None = None) -> int:
        """Fill a polygon, which a second one may be cut out of, over a soft shadow.

        Args:
            hue: the typical colour of what is painted, in [0, 1]; None for no typical one.

        Returns:
            Its area in fine pixels, the part beyond the border included.
        """
        left, top = np.floor(rings[0].min(0)).astype(int) - 1
        right, bottom = np.ceil(rings[0].max(0)).astype(int) + 2
        mask = Image.new("L", (int(right - left), int(bottom - top)))
        pen = ImageDraw.Draw(mask)
        for ring, value in zip(rings, (255, 0), strict=False):
            pen.polygon((ring - (left, top)).round().ravel().tolist(), fill=value)
        covered = np.asarray(mask)
        self._cast_shadow(covered, int(left), int(top))
        self.canvas.paste(self._fill(mask.size, hue), (int(left), int(top)), mask)
        self.owners.paste(owner, (int(left), int(top), int(right), int(bottom)), mask)
        return int(np.count_nonzero(covered))

    def _cast_shadow(self, covered: np.ndarray, left: int, top: int) -> None:
        drop = int(self.rng.uniform(0, 0.02) * self.side)
        self.canvas.paste((15, 15, 25), (left + drop, top + drop), Image.fromarray(covered // 4))

    def _fill(self, size: tuple[int, int], hue: float | None) -> Image.Image:
        """A plain, shaded or striped piece of colour."""
        rng = self.rng
        first, second = self._color(hue), self._color(hue)
        style = rng.random()
        if style < 0.55:
            return Image.new("RGB", size, first)
        ramp = _ramp(rng, 48)
        if style > 0.8:
            ramp = (ramp * rng.integers(3, 7)) % 1 > 0.5
        return _blend(first, second, ramp).resize(size, Image.Resampling.NEAREST)

    def _color(self, typical: float | None = None) -> Color:
        """Near a typical hue where there is one; else often near the scene's own, so that colour alone tells little."""
        rng = self.rng
        if typical is not None and rng.random() < TYPICAL:
            hue = typical + rng.normal(0, 0.05)
        else:
            hue = self.hue + rng.normal(0, 0.07) if rng.random() < 0.25 else rng.random()
        red, green, blue = hsv_to_rgb(hue % 1, rng.uniform(0.25, 0.9), rng.uniform(0.35, 1.0))
        return round(red * 255), round(green * 255), round(blue * 255)

    def _background(self) -> Image.Image:
        """Clouds, a slope, or stripes between two or more muted colours."""
        rng = self.rng
        style = rng.integers(3)
        if style == 0:
            grid = np.array([self._color() for _ in range(25)], dtype=np.uint8).reshape(5, 5, 3)
            image = Image.fromarray(grid)
        else:
            ramp = _ramp(rng, 64)
            if style == 2:
                ramp = np.abs((ramp * rng.integers(2, 9)) % 1 - 0.5) * rng.uniform(0.6, 2)
            image = _blend(self._color(), self._color(), ramp)
        image = Image.blend(image, Image.new("RGB", image.size, self._color()), rng.uniform(0.2, 0.6))
        size = self.side // FINE
        smooth = image.resize((size, size), Image.Resampling.BICUBIC)
        return smooth.resize((self.side, self.side), Image.Resampling.NEAREST)


def _outline(name: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Corner points [P, 2] of a shape around the origin, within radius 1; a second ring is a hole."""
    if name in ("circle", "ring"):
        disc = _regular(48)
        return [disc] if name == "circle" else [disc, disc * rng.uniform(0.45, 0.7)]
    if name == "square":
        return [_regular(4)]
    if name == "triangle":
        return [_regular(3)]
    if name == "star":
        points = _regular(10)
        points[1::2] *= rng.uniform(0.4, 0.5)
        return [points]
    arm = rng.uniform(0.22, 0.34)
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]]) / math.hypot(1, arm)
    return [np.concatenate([quarter @ _rotation(-k * math.pi / 2) for k in range(4)])]


def _regular(corners: int) -> np.ndarray:
    angles = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _log_uniform(rng: np.random.Generator, low: float, high: float, count: int | None = None) -> Any:
    return np.exp(rng.uniform(math.log(low), math.log(high), count))


def _ramp(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side] that grows from 0 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, side)
    slope = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    return 0.5 + slope / (abs(math.cos(angle)) + abs(math.sin(angle)))


def _blend(first: Color, second: Color, share: np.ndarray) -> Image.Image:
    """[h, w] shares of the second colour as an image."""
    share = np.clip(share, 0, 1)[..., None]
    return Image.fromarray((np.array(first) * (1 - share) + np.array(second) * share).round().astype(np.uint8))
