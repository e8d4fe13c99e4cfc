"""Image files to RGB tensors, and the random changes of images in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from defeat_cli.data.faults import ImageError
from defeat_cli.errors import DataError

Target = dict[str, Tensor]
"""`boxes` [M, 4] float32 xyxy pixels, `labels` [M] int64 in 1..K."""
Transform = Callable[[Tensor, Target, np.random.Generator], tuple[Tensor, Target]]
"""Changes an image [3, H, W] uint8 and its target together, at random by the generator alone. It must survive pickling,
because loader processes get it, and must leave its input as it is."""

METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""What Pillow would write anew after turning an image, and fails at where it is a little broken."""


@dataclass(frozen=True)
class RandomFlip:
    """Mirrors left and right, with this chance."""

    chance: float

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        if rng.random() >= self.chance:
            return image, target
        image, boxes = horizontal_flip(image, target["boxes"])
        return image, {**target, "boxes": boxes}


def horizontal_flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror left and right an image [..., H, W] and its boxes [M, 4] xyxy in pixels."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - x2, y1, width - x1, y2], dim=-1)


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
        ImageError: the file is missing, broken, of a mode that has no clear 8-bit meaning, or not of the expected size.
    """
    try:
        with Image.open(path) as image:
            image.load()
            stored, upright = (image.height, image.width), _upright_size(image)
            # Where only the stored image is of the annotated size, whoever drew the boxes saw it as it is stored.
            turn = expected_size is None or stored != tuple(expected_size) or upright == stored
            for key in METADATA:
                image.info.pop(key, None)
            pixels = _as_rgb(ImageOps.exif_transpose(image) if turn else image)
    except Exception as error:  # Pillow's decoders raise nearly every kind of exception on broken files
        raise _image_error(path, error) from error
    if expected_size is not None and (pixels.height, pixels.width) != tuple(expected_size):
        raise _other_size(path, (pixels.height, pixels.width), expected_size)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) that `read_image` gives, from the file's header.

    Raises:
        ImageError: the file is missing, or no image.
    """
    return _header_sizes(path)[1]


def check_header(path: Path, expected_size: tuple[int, int]) -> None:
    """What `read_image` refuses of a file, as far as its header tells.

    Raises:
        ImageError: the file is missing, no image, or not of the expected (height, width).
    """
    sizes = _header_sizes(path)
    if tuple(expected_size) not in sizes:
        raise _other_size(path, sizes[1], expected_size)


def _header_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) as stored, and after the turn that EXIF asks for."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width), _upright_size(image)
    except Exception as error:  # as above
        raise _image_error(path, error) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after the turn that EXIF asks for."""
    exif = Image.Image.getexif(image)  # a PNG's own looks behind the pixels too, and reads them all for that
    lying = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (image.width, image.height) if lying else (image.height, image.width)


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


def _image_error(path: Path, error: Exception) -> ImageError:
    """What a failure to read an image means."""
    if isinstance(error, FileNotFoundError):
        return ImageError.of("missing", f"{path}: is not there")
    if isinstance(error, DataError):
        return ImageError.of("unreadable", f"{path}: {error}")
    with contextlib.suppress(OSError, ValueError):
        if path.stat().st_size == 0:
            return ImageError.of("empty", f"{path}: is an empty file, of zero bytes")
    if isinstance(error, UnidentifiedImageError):
        return ImageError.of("unreadable", f"{path}: is not an image that can be read")
    if isinstance(error, MemoryError):
        return ImageError.of("unreadable", f"{path}: cannot be read: there is not enough memory for it")
    short = isinstance(error, OSError) and "truncated" in str(error).lower()
    return ImageError.of("truncated" if short else "unreadable", f"{path}: cannot be read: {error}")


def _other_size(path: Path, size: tuple[int, int], expected: tuple[int, int]) -> ImageError:
    return ImageError.of(
        "size",
        f"{path}: is {size[1]}x{size[0]}, but its annotations say {expected[1]}x{expected[0]} (width x height); boxes "
        "would not fit. Correct width and height, or leave both out",
    )
