"""VOC's own layout: image sets, whole names, and which image an annotation file is of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from data.layouts import DOG, page, thing, write_images, write_text, write_voc

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.formats.voc_xml import CLASSES
from defeat_cli.data.opening import open_split
from defeat_cli.errors import DataError


def opened(folder: Path, split: str = "train", named: str | None = None) -> DetectionDataset:
    return open_split(folder, split, annotations=named, train=split == "train")


def names(data: DetectionDataset) -> list[str]:
    return [data.file_name(i) for i in range(len(data))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_voc(tmp_path, train=["one", "two"], val=["three"])
    write_text(
        tmp_path / "Annotations/one.xml",
        page("one.jpg", thing("dog", (1, 1, 20, 10), 0), thing("cat", (3, 2, 5, 6), 1)),
    )
    unsized = page("", thing("cat", (4.5, 2, 6, 8)), size="<width>0</width><height>0</height>")
    write_text(tmp_path / "Annotations/two.xml", unsized)
    return tmp_path


def test_a_split_is_read_as_it_is(folder: Path) -> None:
    data = opened(folder)
    assert (data.layout, data.classes) == ("voc", list(CLASSES))
    assert names(data) == ["JPEGImages/one.jpg", "JPEGImages/two.jpg"]
    # VOC counts pixels from 1 and includes the last: the whole image of 20 x 10 is 1, 1, 20, 10.
    assert data[0].target["boxes"].tolist() == [[0, 0, 20, 10]]
    assert [data.classes[label - 1] for label in data[0].target["labels"]] == ["dog"]  # the difficult cat is left out
    assert data[1].target["boxes"].tolist() == [[3.5, 1, 6, 8]]
    assert data.sizes == [(10, 20), (10, 20)]
    truth = data.coco.dataset["annotations"]
    assert [row["iscrowd"] for row in truth] == [0, 1, 0]
    assert truth[1]["bbox"] == [2, 1, 3, 5]
    assert opened(folder, "val")[0].target["boxes"].tolist() == [[2, 1, 8, 5]]


def test_named_image_sets_and_years(folder: Path, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    write_voc(kit / "VOC2007", trainval=["a"], test=["c"])
    write_voc(kit / "VOC2012", trainval=["b"])
    both = opened(kit, named="VOC2007/trainval+VOC2012/trainval")
    assert names(both) == ["VOC2007/JPEGImages/a.jpg", "VOC2012/JPEGImages/b.jpg"]
    assert both[1].target["boxes"].tolist() == [[2, 1, 8, 5]]
    with pytest.raises(DataError, match=r"kit: not in VOC's layout .*; name image sets .*, e\.g\. VOC2007/train"):
        opened(kit)
    shutil.rmtree(kit / "VOC2012")
    assert names(opened(kit, "test")) == ["VOC2007/JPEGImages/c.jpg"]  # one folder too high
    assert names(opened(kit, "train", "trainval.txt")) == ["VOC2007/JPEGImages/a.jpg"]
    with pytest.raises(DataError, match=r"whose images are in JPEGImages; leave data\.train_images out"):
        open_split(folder, "train", images="JPEGImages", train=True)


def test_other_classes_are_those_of_all_files_in_every_split(folder: Path) -> None:
    write_text(folder / "Annotations/three.xml", page("three.jpg", thing("axolotl", (1, 1, 4, 4))))
    assert opened(folder, "val").classes == opened(folder, "train").classes == ["axolotl", "cat", "dog"]


def test_classes_that_differ_by_case_are_one_and_that_is_said(folder: Path) -> None:
    write_text(folder / "Annotations/three.xml", page("three.jpg", thing("Dog", (1, 1, 4, 4))))
    data = opened(folder, "val")
    assert data.classes == list(CLASSES)
    assert data[0].target["labels"].tolist() == [CLASSES.index("dog") + 1]
    assert any("differ by case alone are read as one: Dog as dog" in note for note in data.notes)
    # Of names that are not VOC's the more frequent is taken; letters are classes of their own.
    write_text(folder / "Annotations/one.xml", page("one.jpg", thing("RBC", (1, 1, 4, 4)), thing("RBC", (1, 1, 4, 4))))
    write_text(folder / "Annotations/two.xml", page("", thing("rbc", (1, 1, 4, 4)), thing("a", (1, 1, 4, 4))))
    write_text(folder / "Annotations/three.xml", page("three.jpg", thing("A", (1, 1, 4, 4))))
    assert opened(folder).classes == ["A", "RBC", "a"]


def test_the_image_is_the_one_that_is_named(folder: Path) -> None:
    # A mask, and a file of another kind, called alike.
    write_images(folder / "JPEGImages", "three.png", "other.jpg", "sub/two.png")
    write_text(folder / "JPEGImages/three.json", "{}")
    assert names(opened(folder, "val")) == ["JPEGImages/three.jpg"]
    # Names without an image fall back to the annotation file's own.
    for absent in ("gone.jpg", "C:\\photos\\gone.jpg", ""):
        (folder / "JPEGImages/three.png").unlink(missing_ok=True)
        write_text(folder / "Annotations/three.xml", page(absent, DOG))
        assert names(opened(folder, "val")) == ["JPEGImages/three.jpg"]
    write_images(folder / "JPEGImages", "three.png")
    with pytest.raises(
        DataError, match=r"three\.xml: its image can be three\.jpg or three\.png: its <filename> is None"
    ):
        opened(folder, "val")
    write_text(folder / "Annotations/three.xml", page("other.jpg", DOG))
    with pytest.raises(DataError, match=r"three\.xml: is it of other\.jpg, its <filename>, or of three\.jpg"):
        opened(folder, "val")


def test_images_of_other_types_and_names_with_other_stems(folder: Path) -> None:
    (folder / "JPEGImages/three.jpg").unlink()
    write_images(folder / "JPEGImages", "photo.PNG")
    write_text(folder / "Annotations/three.xml", page("photo.PNG", DOG))
    assert names(opened(folder, "val")) == ["JPEGImages/photo.PNG"]


def test_lines_of_an_image_set_are_whole_names(folder: Path) -> None:
    stems = ["a b", "img.v1", "x.jpg", "one 1", " lead", "Zoë 斑", "tab\tname", "deep/er/f", "line\u2028sep", "#1;-"]
    write_voc(folder, val=stems)
    assert names(opened(folder, "val")) == [f"JPEGImages/{stem}.jpg" for stem in stems]
    for encoding in ("utf-8-sig", "utf-16"):
        text = "".join(f"{stem}\r\n" for stem in stems) + "\r\n  \r\n"
        write_text(folder / "ImageSets/Main/val.txt", text, encoding)
        assert names(opened(folder, "val")) == [f"JPEGImages/{stem}.jpg" for stem in stems]
    # A class's own set has a second column; names with a suffix, and without their folder, are as clear.
    write_text(folder / "ImageSets/Main/cat_train.txt", "one  1\ntwo -1\na b  0\nthree.jpg\nf\n")
    assert [Path(name).stem for name in names(opened(folder, named="cat_train"))] == ["one", "two", "a b", "three", "f"]


def test_an_image_listed_twice_is_read_once(folder: Path) -> None:
    data = opened(folder, named="train+val+train")
    assert len(data) == 3
    assert any("2 lines of the image sets repeat an image" in note for note in data.notes)


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "utf-16", "shift_jis", "cp1251", "utf-8-sig"])
def test_annotation_files_in_other_encodings(folder: Path, encoding: str) -> None:
    name = {"gbk": "斑马", "latin-1": "zèbre", "shift_jis": "シマウマ", "cp1251": "зебра"}.get(encoding, "зè斑")
    declared = encoding.removesuffix("-sig")
    text = f'<?xml version="1.0" encoding="{declared}"?>\n' + page("three.jpg", thing(name, (1, 1, 4, 4)))
    write_text(folder / "Annotations/three.xml", text, encoding)
    assert name in opened(folder, "val").classes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"<annotation>\n<object>\n</annotation>", r"three\.xml:3: not valid XML: mismatched tag"),
        (b"", r"three\.xml:1: not valid XML: no element found"),
        (b"<annotation>\n<x>z\xe8bre</x></annotation>", r"three\.xml:2: not text in UTF-8; save the file in UTF-8"),
        (b'<?xml version="1.0" encoding="klingon"?><a/>', r"three\.xml: says that it is in klingon, an encoding that"),
        (b'<?xml version="1.0" encoding="hex"?><a/>', r"three\.xml: says that it is in hex"),
        (b"<annotations><image/></annotations>", r"its root is <annotations>, .*; this is CVAT's own format"),
        (page("", "<object/>").encode(), r"three\.xml: an object has no name"),
        (
            page("", "<object><name>cat</name></object>").encode(),
            r"three\.xml: object cat: bndbox must hold the numbers xmin, ymin, xmax, ymax; found None, None",
        ),
        (page("", thing("cat", (1, "nan", 3, 4))).encode(), r"object cat: bndbox must hold .*found 1, nan, 3, 4"),
        (
            page("", thing("cat", (1, 2, 3, 4), "maybe")).encode(),
            r"object cat: difficult must be 0 or 1, found 'maybe'",
        ),
    ],
)
def test_bad_annotation_files_are_named(folder: Path, text: bytes, message: str) -> None:
    (folder / "Annotations/three.xml").write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        opened(folder, "val")
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"Main: no image set test; there are: train, val\. Name one by"):
        opened(folder, "test")
    with pytest.raises(DataError, match=r"Annotations: not in VOC's layout"):
        open_split(folder / "Annotations", "train", format="voc", train=True)
    (folder / "Annotations/three.xml").unlink()
    with pytest.raises(DataError, match=r"three\.xml: is listed in an image set \(.*val\.txt:1\), but is not there"):
        opened(folder, "val")
    (folder / "JPEGImages/one.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images is not in .*: JPEGImages/one\.jpg"):
        opened(folder)
    write_text(folder / "ImageSets/Main/train.txt", "one\nz\xe8bre\n", "latin-1")
    with pytest.raises(DataError, match=r"train\.txt:2: not text in UTF-8"):
        opened(folder)
    write_text(folder / "Annotations/a/two.xml", page("", DOG))
    write_text(folder / "Annotations/b/three.xml", page("", DOG))
    write_text(folder / "Annotations/c/three.xml", page("", DOG))
    write_text(folder / "ImageSets/Main/train.txt", "three\n")
    with pytest.raises(DataError, match=r"train\.txt:1: three can be b/three\.xml or c/three\.xml; give its folder"):
        opened(folder)
