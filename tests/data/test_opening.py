"""Which layout a folder is in, what is taken of it, and what is said where it is in none."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.layouts import coco_of, write_coco, write_images, write_text, write_voc, write_yolo

from defeat_cli.data.formats import FORMATS
from defeat_cli.data.opening import open_split
from defeat_cli.errors import DataError


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    names = [f"{i}.jpg" for i in range(10)]
    write_images(tmp_path / "images", *names)
    content = coco_of(*names)
    content["categories"] += [{"id": 2, "name": "cat"}, {"id": 3, "name": "cow"}]
    for i, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = i % 3 + 1
    write_coco(tmp_path / "train.json", *names, **content)
    return tmp_path


def test_a_folder_in_several_layouts_is_told(tmp_path: Path) -> None:
    write_voc(tmp_path, train=["a"])
    assert not any("read as" in note for note in open_split(tmp_path, "train", train=True).notes)
    write_yolo(tmp_path, train=["b"])
    data = open_split(tmp_path, "train", train=True)
    assert data.layout == "voc"
    assert "read as voc; it is also like yolo, which data.format chooses" in data.notes[0]
    for layout, names in (("yolo", ["images/train/b.jpg"]), ("voc", ["JPEGImages/a.jpg"])):
        data = open_split(tmp_path, "train", layout, train=True)
        assert [data.file_name(i) for i in range(len(data))] == names
    assert set(FORMATS) == {"voc", "coco", "yolo", "xml"}


def test_one_folder_too_high(tmp_path: Path) -> None:
    write_yolo(tmp_path / "archive/set", train=["a"])
    data = open_split(tmp_path / "archive", "train", train=True)
    assert data.file_name(0) == "images/train/a.jpg"
    assert data.notes[0].endswith("archive/set: taken, the only folder with data in the one given")
    write_yolo(tmp_path / "archive/other", train=["a"])
    with pytest.raises(DataError, match=r"Folders inside are in a layout: name one of .*archive/other, .*archive/set"):
        open_split(tmp_path / "archive", "train", train=True)


def test_vocs_image_sets_are_found_from_the_folder_above_vocdevkit(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit/VOC2007", train=["a"], val=["b", "c"])
    for folder in (tmp_path / "VOCdevkit/VOC2007", tmp_path / "VOCdevkit", tmp_path):
        data = open_split(folder, "val", train=False)
        assert (data.layout, len(data)) == ("voc", 2)


def test_annotation_files_in_a_folder_beside_the_images(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", "a.jpg", "b.jpg")
    for split, name in (("train", "a.jpg"), ("val", "b.jpg")):
        write_coco(tmp_path / "labels" / f"my_{split}.json", name)
        data = open_split(tmp_path, split, train=False)
        assert [data.file_name(i) for i in range(len(data))] == [f"pictures/{name}"]


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.5, 0.999])
def test_dividing_is_by_image_and_seed(simple: Path, fraction: float) -> None:
    def files(split: str, seed: int = 0) -> list[str]:
        data = open_split(simple, split, train=False, val_fraction=fraction, split_seed=seed)
        return [data.file_name(i) for i in range(len(data))]

    train, val = files("train"), files("val")
    assert len(val) == min(max(round(fraction * 10), 1), 9)
    assert sorted(train + val) == [f"{i}.jpg" for i in range(10)]
    assert files("val") == val == sorted(val)
    assert {tuple(files("val", seed)) for seed in range(5)} > {tuple(val)}
    # Whatever the order of the file, the same images validate.
    content = coco_of(*(f"{i}.jpg" for i in reversed(range(10))))
    write_coco(simple / "train.json", **content)
    assert sorted(files("val")) == val
    data = open_split(simple, "val", train=False, val_fraction=fraction)
    assert any(f"data.val_fraction sets {len(val)} of 10 images apart for validation" in note for note in data.notes)
    assert data[0].target["boxes"].tolist() == [[2, 1, 8, 5]]


def test_some_classes_are_kept(simple: Path) -> None:
    data = open_split(simple, "train", train=True, classes=["cow", "dog"])
    assert (data.classes, data.annotations.category_ids) == (["dog", "cow"], [1, 3])
    assert [data[i].target["labels"].tolist() for i in range(4)] == [[1], [], [2], [1]]
    assert len(data.coco.dataset["annotations"]) == 7
    assert any("data.classes keeps 2 of 3 classes; 3 boxes of others left out" in note for note in data.notes)
    (own,) = data.in_own_ids([{"image_id": 1, "category_id": 2}])
    assert own["category_id"] == 3
    with pytest.raises(DataError, match=r"data\.classes: .*train\.json has no class 'cat '; did you mean cat\?"):
        open_split(simple, "train", train=True, classes=["cat "])
    with pytest.raises(DataError, match="has no class 'zebra'; it has dog, cat, cow"):
        open_split(simple, "train", train=True, classes=["zebra"])


def test_what_cannot_be_used_is_refused(simple: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_split(tmp_path / "nowhere", "val", train=False)
    with pytest.raises(DataError, match="no split 'vall'; use train, val, test"):
        open_split(simple, "vall", train=False)
    write_coco(simple / "val.json", "0.jpg", annotations=[])
    with pytest.raises(DataError, match=r"val\.json: the validation images have no boxes: nothing to"):
        open_split(simple, "val", train=False)
    with pytest.raises(DataError, match=r"val\.json: has 1 image; data\.val_fraction needs two"):
        open_split(simple, "val", annotations="val.json", train=False, val_fraction=0.5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "Found no files"),
        (
            {"a.jpg": "", "b.PNG": "", "c/d.jpg": ""},
            r"Found 2 \.jpg, 1 \.png \(e\.g\. a\.jpg, b\.PNG\); these are",
        ),
        ({"JPEGImages/a.jpg": "", "x.txt": ""}, "looks like VOC's layout without Annotations beside JPEGImages"),
        (
            {"images/a.jpg": "", "labels/a.txt": "0 0 0 0 0"},
            r"looks like YOLO's layout, but no data\.yaml or cl",
        ),
        (
            {"a.jpg": "", "a.json": '{"shapes": [], "imagePath": "a.jpg"}'},
            "looks like LabelMe's files, one for each",
        ),
        ({"x.json": '[{"image": "a", "annotations": []}]'}, "looks like CreateML's JSON"),
        ({"x.json": '[{"data": {}, "annotations": []}]'}, "looks like Label Studio's own JSON"),
        ({"x.json": '{"_via_settings": {}}'}, "looks like a VIA project"),
        ({"x.json": '{"images": []'}, r"x\.json is not JSON that can be read"),
        ({"x.json": "3"}, r"x\.json holds no lists images, annotations and categories"),
        (
            {"train/_annotations.csv": "", "train/a.jpg": ""},
            r"looks like CSV files .*: export COCO, VOC or YOLO",
        ),
        ({"train.tfrecord": ""}, "looks like TFRecords"),
        ({"data.zip": ""}, "looks like an archive that is not unpacked"),
    ],
)
def test_near_misses_are_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        write_text(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as caught:
        open_split(tmp_path, "train", train=True)
    for part in ("Looked for", "COCO: ", "VOC: ", "YOLO: ", "--set data.train_annotations=FILE"):
        assert part in str(caught.value)


def test_a_file_that_is_no_json_is_refused_by_its_name(tmp_path):
    file = tmp_path / "data.yaml"
    file.write_text("names: [cat]\n")
    with pytest.raises(DataError, match=r"data\.yaml: data is a folder, or a COCO file in JSON"):
        open_split(file, "train", train=True)
