"""Image files to RGB tensors, and the flip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from defeat_cli.errors import DataError

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright. 5 to 8 swap height and width."""


def read_image(path: Path, expected_size: tuple[int, int] | None = None) -> Tensor:
    """An image of any Pillow mode as RGB.

    Grayscale is repeated, palettes are looked up, 16-bit grayscale is scaled to 8 bits, CMYK is converted, and alpha is
    dropped (not blended), as in the pipelines that published detectors were trained with. The EXIF orientation is
    applied, unless only the unturned image has the expected size.

    Args:
        expected_size: (height, width) that the annotations give.

    Returns:
        [3, H, W] uint8.

    Raises:
        DataError: the file is missing, broken, of a mode that has no clear 8-bit meaning, or not of the expected size.
    """
    try:
        with Image.open(path) as image:
            turn = _turn(image, expected_size)
            image.load()
            pixels = _as_rgb(image)
            if turn is not None:
                pixels = pixels.transpose(turn)
    except Exception as error:  # Pillow's decoders raise nearly every kind of exception on broken files
        raise DataError(f"{path}: {_reason(error)}") from error
    if expected_size is not None and (pixels.height, pixels.width) != tuple(expected_size):
        raise DataError(
            f"{path}: is {pixels.width}x{pixels.height}, but its annotations say {expected_size[1]}x{expected_size[0]} "
            "(width x height); boxes would not fit. Correct width and height, or leave both out"
        )
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) that `read_image` gives, from the file's header.

    Raises:
        DataError: the file is missing, or no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except Exception as error:  # as above
        raise DataError(f"{path}: {_reason(error)}") from error


def horizontal_flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror left and right an image [..., H, W] and its boxes [M, 4] xyxy in pixels."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in TURNS else 1


def _turn(image: Image.Image, expected_size: tuple[int, int] | None) -> Image.Transpose | None:
    orientation = _orientation(image)
    raw = (image.height, image.width)
    turned = raw[::-1] if orientation >= 5 else raw
    if expected_size is not None and raw == tuple(expected_size) != turned:
        return None  # whoever drew the boxes saw the image as it is stored
    return TURNS.get(orientation)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise DataError("holds 32-bit numbers, whose range is not known; store it with 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("holds fractions, whose range is not known; store it with 8 or 16 bits")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB Pillow warns where the palette has transparent entries
    elif image.mode in ("LA", "La"):
        image = image.getchannel("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that can be read"
    return f"cannot be read: {error}"
