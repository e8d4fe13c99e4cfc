"""Every kind of image file becomes the RGB that a person sees."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from defeat_cli.data.transforms import RandomFlip, horizontal_flip, image_size, read_image
from defeat_cli.errors import DataError

HEIGHT, WIDTH = 5, 7


@pytest.fixture
def colors() -> np.ndarray:
    """[5, 7, 3] random pixels, no two rows or columns alike."""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def as_array(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    return image.permute(1, 2, 0).numpy()


def test_rgb_is_read_as_it_is(tmp_path: Path, colors: np.ndarray) -> None:
    Image.fromarray(colors).save(tmp_path / "a.png")
    assert (as_array(read_image(tmp_path / "a.png")) == colors).all()


def test_jpeg_is_read_as_pillow_does(tmp_path: Path, colors: np.ndarray) -> None:
    Image.fromarray(colors).save(tmp_path / "a.jpg")
    assert (as_array(read_image(tmp_path / "a.jpg")) == np.asarray(Image.open(tmp_path / "a.jpg"))).all()


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grayscale_is_repeated(tmp_path: Path, mode: str) -> None:
    gray = np.array([[0, 255, 255], [255, 0, 0]], dtype=np.uint8)
    Image.fromarray(gray).convert(mode).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == mode
    assert (as_array(read_image(tmp_path / "a.png")) == gray[..., None]).all()


def test_alpha_is_dropped(tmp_path: Path, colors: np.ndarray) -> None:
    alpha = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH, 1) * 7
    Image.fromarray(np.concatenate([colors, alpha], 2)).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "RGBA"
    assert (as_array(read_image(tmp_path / "a.png")) == colors).all()


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette_is_looked_up(tmp_path: Path, transparency: int | bytes | None) -> None:
    palette = np.array([[255, 0, 0], [0, 200, 10], [3, 4, 5]], dtype=np.uint8)
    index = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    image = Image.fromarray(index, mode=None).convert("P")
    image.putpalette(palette.ravel().tolist())
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    assert Image.open(tmp_path / "a.png").mode == "P"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (as_array(read_image(tmp_path / "a.png")) == palette[index]).all()


def test_cmyk_is_converted(tmp_path: Path) -> None:
    # Full cyan ink leaves green and blue; full black ink leaves nothing.
    inks = np.array([[[255, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 0]]], dtype=np.uint8)
    Image.fromarray(inks, mode="CMYK").save(tmp_path / "a.tif")
    assert as_array(read_image(tmp_path / "a.tif")).tolist() == [[[0, 255, 255], [0, 0, 0], [255, 255, 255]]]
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert np.abs(as_array(read_image(tmp_path / "a.jpg")).astype(int) - (0, 255, 255)).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    # 65535 / 255 = 257 a step: 257 k is exactly k, 128 of 257 rounds down, 129 up.
    deep = np.array([[0, 257, 65535], [128, 129, 257 * 77]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / name)
    assert as_array(read_image(tmp_path / name))[..., 0].tolist() == [[0, 1, 255], [0, 1, 77]]


def test_32_bit_and_float_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"i\.tif: holds 32-bit numbers"):
        read_image(tmp_path / "i.tif")
    with pytest.raises(DataError, match=r"f\.tif: holds fractions"):
        read_image(tmp_path / "f.tif")


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # stored turned to the left: turned back clockwise
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, colors: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(colors).save(tmp_path / "a.png", exif=exif)
    upright = UPRIGHT[orientation](colors)
    assert image_size(tmp_path / "a.png") == upright.shape[:2]
    for expected_size in (None, upright.shape[:2]):
        assert (as_array(read_image(tmp_path / "a.png", expected_size)) == upright).all()


def test_exif_orientation_is_left_where_annotations_are_of_the_stored_image(tmp_path: Path, colors: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(colors).save(tmp_path / "a.png", exif=exif)
    assert (as_array(read_image(tmp_path / "a.png", (HEIGHT, WIDTH))) == colors).all()


def test_an_orientation_among_broken_metadata_is_applied(tmp_path: Path, colors: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.0
    Image.fromarray(colors).save(tmp_path / "a.webp", lossless=True, exif=exif)
    # A resolution in letters: Pillow reads that, and cannot write it.
    content = (tmp_path / "a.webp").read_bytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    (tmp_path / "a.webp").write_bytes(content)
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.webp"))
    assert (as_array(read_image(tmp_path / "a.webp")) == np.rot90(colors, -1)).all()


def test_unknown_orientation_is_upright(tmp_path: Path, colors: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    Image.fromarray(colors).save(tmp_path / "a.png", exif=exif)
    assert (as_array(read_image(tmp_path / "a.png")) == colors).all()


def test_other_size_than_annotated_is_refused(tmp_path: Path, colors: np.ndarray) -> None:
    Image.fromarray(colors).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: is 7x5, but its annotations say 14x10"):
        read_image(tmp_path / "a.png", (10, 14))


def test_missing_broken_and_truncated_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(big).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    with pytest.raises(DataError, match=r"gone\.jpg: is not there"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"text\.jpg: is not an image that can be read"):
        read_image(tmp_path / "text.jpg")
    for name in ("cut.jpg", "cut.png"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read: .*truncated"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"text\.jpg: is not an image"):
        image_size(tmp_path / "text.jpg")


def test_flip_moves_pixels_and_boxes_alike() -> None:
    # A box of ones at columns 1..3 of 10 goes to columns 6..8: x from [1, 4] to [10 - 4, 10 - 1].
    image = torch.zeros(3, 6, 10, dtype=torch.uint8)
    image[:, 2:5, 1:4] = 1
    flipped, boxes = horizontal_flip(image, torch.tensor([[1.0, 2.0, 4.0, 5.0]]))
    assert boxes.tolist() == [[6.0, 2.0, 9.0, 5.0]]
    assert flipped[:, 2:5, 6:9].min() == 1
    assert flipped.sum() == image.sum()


def test_flip_without_boxes() -> None:
    _, boxes = horizontal_flip(torch.zeros(3, 4, 4), torch.zeros(0, 4))
    assert boxes.shape == (0, 4)


def test_transforms_leave_their_input_alone() -> None:
    image, target = torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3), {"boxes": torch.tensor([[0.0, 0, 1, 2]])}
    flipped, changed = RandomFlip(1.0)(image, target, np.random.default_rng(0))
    assert flipped.tolist() == [[[2, 1, 0], [5, 4, 3]]]
    assert changed["boxes"].tolist() == [[2, 0, 3, 2]]
    assert (image[0, 0].tolist(), target["boxes"].tolist()) == ([0, 1, 2], [[0, 0, 1, 2]])
    assert RandomFlip(0.0)(image, target, np.random.default_rng(0)) == (image, target)
