"""Images with VOC's XML files and no image sets, as raccoon, kangaroo and Roboflow's VOC export are published."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.layouts import DOG, page, thing, write_images, write_text

from defeat_cli.data.opening import open_split
from defeat_cli.errors import DataError


def write(folder: Path, images: str, xmls: str, *stems: str) -> None:
    for stem in stems:
        write_images(folder / images, f"{stem}.jpg")
        write_text(folder / xmls / f"{stem}.xml", page(f"{stem}.jpg", DOG))


@pytest.mark.parametrize(
    ("images", "xmls"), [("images", "annotations"), ("images", "annots"), (".", "."), ("a", "a/b")]
)
def test_undivided_folders(tmp_path: Path, images: str, xmls: str) -> None:
    write(tmp_path, images, xmls, *(f"r-{i}" for i in range(10)))
    write_text(tmp_path / "README.md", "raccoons")
    parts = {split: open_split(tmp_path, split, train=False, val_fraction=0.2) for split in ("train", "val")}
    assert parts["val"].layout == "xml"
    assert (len(parts["train"]), len(parts["val"])) == (8, 2)
    files = [part.file_name(i) for part in parts.values() for i in range(len(part))]
    assert sorted(files) == sorted({f"{images}/r-{i}.jpg".removeprefix("./") for i in range(10)})
    assert parts["train"].classes == parts["val"].classes == ["dog"]
    assert parts["val"][0].target["boxes"].tolist() == [[2, 1, 8, 5]]
    with pytest.raises(DataError, match=r"its 10 XML files are not divided into train and val; set a part"):
        open_split(tmp_path, "val", train=False)


def test_folders_called_like_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path, split, split, "same", split)
    write_text(tmp_path / "test/test.xml", page("test.jpg", thing("cat", (1, 1, 4, 4))))
    val = open_split(tmp_path, "val", train=False)
    assert [val.file_name(i) for i in range(2)] == ["valid/same.jpg", "valid/valid.jpg"]
    assert val.classes == open_split(tmp_path, "train", train=True).classes == ["cat", "dog"]
    assert len(open_split(tmp_path, "test", train=False)) == 2
    assert len(open_split(tmp_path, "train", val_fraction=0.5, train=True)) == 1


def test_annotation_files_in_split_folders_beside_image_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path, f"images/{split}", f"annotations/{split}", "1", "2")
    val = open_split(tmp_path, "val", train=False)
    assert [val.file_name(i) for i in range(2)] == ["images/val/1.jpg", "images/val/2.jpg"]


def test_bad_cases_are_named(tmp_path: Path) -> None:
    write(tmp_path, "train", "train", "a", "b")
    with pytest.raises(DataError, match=r"no XML files in a folder called val or valid or validation; there is train"):
        open_split(tmp_path, "val", train=False)
    (tmp_path / "train").rename(tmp_path / "test")
    with pytest.raises(
        DataError, match=r"no XML files in a folder called train or training; there is test\. Name a folder"
    ):
        open_split(tmp_path, "val", train=False, val_fraction=0.5)
    (tmp_path / "test").rename(tmp_path / "train")
    with pytest.raises(DataError, match=r"nowhere: no such folder \(data\.train_images\)"):
        open_split(tmp_path, "train", images="nowhere", train=True)
    (tmp_path / "train/a.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images is not in .*: train/a\.jpg"):
        open_split(tmp_path, "train", train=True)
    write_images(tmp_path / "other", "a.png", "a.bmp")
    with pytest.raises(
        DataError, match=r"a\.xml: its image can be other/a\.bmp or other/a\.png: .*'a\.jpg', which is not"
    ):
        open_split(tmp_path, "train", train=True)
