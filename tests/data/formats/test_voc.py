"""VOC's folders, and its average precision by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defeat_cli.data.dataset import open_split
from defeat_cli.data.formats import voc
from defeat_cli.data.formats.voc import average_precision, voc_ap50
from defeat_cli.errors import DataError


def thing(name: str, box: tuple[float, ...], difficult: int | None = None) -> str:
    corners = "".join(f"<{key}>{v}</{key}>" for key, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    mark = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{mark}<bndbox>{corners}</bndbox>{part}</object>"


def write(folder: Path, name: str, *objects: str, size: str = "<width>20</width><height>10</height>") -> None:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(folder / "JPEGImages" / f"{name}.jpg")
    text = f"<annotation><filename>other.jpg</filename><size>{size}</size>\n{''.join(objects)}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "one", thing("dog", (1, 1, 20, 10), 0), thing("cat", (3, 2, 5, 6), 1))
    write(tmp_path, "two", thing("cat", (4.5, 2, 6, 8)), size="<width>0</width><height>0</height>")
    write(tmp_path, "three")
    (tmp_path / "ImageSets/Main/train.txt").write_text("one\ntwo\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("three\n\n")
    (tmp_path / "ImageSets/Main/cat_trainval.txt").write_text("one  1\nthree -1\n")
    return tmp_path


def test_a_split_is_read_as_it_is(folder: Path) -> None:
    data = open_split(folder, "train", train=True)
    assert data.classes == list(voc.CLASSES)
    assert [data.file_name(i) for i in range(2)] == ["JPEGImages/one.jpg", "JPEGImages/two.jpg"]
    # VOC counts pixels from 1 and includes the last: the whole image of 20 x 10 is 1, 1, 20, 10.
    assert data[0].target["boxes"].tolist() == [[0, 0, 20, 10]]
    assert [data.classes[label - 1] for label in data[0].target["labels"]] == ["dog"]  # the difficult cat is left out
    assert data[1].target["boxes"].tolist() == [[3.5, 1, 6, 8]]
    assert data.sizes == [(10, 20), (10, 20)]
    truth = data.coco.dataset["annotations"]
    assert [row["iscrowd"] for row in truth] == [0, 1, 0]
    assert truth[1]["bbox"] == [2, 1, 3, 5]
    assert len(open_split(folder, "val", train=False)) == 1


def test_named_image_sets_and_years(folder: Path, tmp_path: Path) -> None:
    assert open_split(folder, "train", annotations="cat_trainval", train=True).image_ids == [1, 2]
    for year, name in (("VOC2007", "a"), ("VOC2012", "b")):
        write(tmp_path / "kit" / year, name, thing("dog", (1, 1, 4, 4)))
        (tmp_path / "kit" / year / "ImageSets/Main/trainval.txt").write_text(name)
    both = open_split(tmp_path / "kit", "train", annotations="VOC2007/trainval+VOC2012/trainval", train=True)
    assert [both.file_name(i) for i in range(2)] == ["VOC2007/JPEGImages/a.jpg", "VOC2012/JPEGImages/b.jpg"]
    assert both[1].target["boxes"].tolist() == [[0, 0, 4, 4]]
    with pytest.raises(
        DataError, match=r"kit: not in VOC's layout .*; name image sets in its folders, e\.g\. VOC2007/train"
    ):
        open_split(tmp_path / "kit", "train", train=True)


def test_other_classes_are_those_of_all_files(folder: Path) -> None:
    write(folder, "four", thing("axolotl", (1, 1, 4, 4)))
    (folder / "ImageSets/Main/val.txt").write_text("four\n")
    assert open_split(folder, "val", train=False).classes == ["axolotl", "cat", "dog"]


def test_images_of_other_types(folder: Path) -> None:
    (folder / "JPEGImages/three.jpg").unlink()
    Image.new("RGB", (20, 10)).save(folder / "JPEGImages/three.png")
    assert open_split(folder, "val", train=False).file_name(0) == "JPEGImages/three.png"


def test_bad_input(folder: Path) -> None:
    with pytest.raises(DataError, match=r"Main: no image set test; there are: cat_trainval, train, val"):
        open_split(folder, "val", annotations="test", train=False)
    with pytest.raises(DataError, match=r"Annotations: not in VOC's layout"):
        open_split(folder / "Annotations", "train", format="voc", train=True)
    (folder / "Annotations/three.xml").write_text("<annotation>\n<object>\n</annotation>")
    with pytest.raises(DataError, match=r"three\.xml:3: not valid XML: mismatched tag"):
        open_split(folder, "val", train=False)
    (folder / "Annotations/three.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    with pytest.raises(DataError, match=r"three\.xml: object cat: bndbox must hold the numbers xmin"):
        open_split(folder, "val", train=False)
    (folder / "Annotations/three.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(DataError, match=r"three\.xml: an object has no name"):
        open_split(folder, "val", train=False)
    (folder / "Annotations/three.xml").unlink()
    with pytest.raises(DataError, match=r"three\.xml: is listed in an image set, but is not there"):
        open_split(folder, "val", train=False)
    (folder / "JPEGImages/one.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of its 2 images are not in .*: JPEGImages/one\.jpg"):
        open_split(folder, "train", train=True)


def truth(*rows: tuple[int, list[float], int]) -> dict[str, Any]:
    return {
        "categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}],
        "annotations": [
            {"image_id": image, "category_id": 1, "bbox": box, "iscrowd": difficult} for image, box, difficult in rows
        ],
    }


def found(image: int, box: list[float], score: float, category: int = 1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


BOX, FAR = [0, 0, 10, 10], [50, 50, 10, 10]


def test_average_precision_by_hand() -> None:
    # Right, wrong, right, right of 4 boxes: precision 1, 1/2, 2/3, 3/4 at recall 1/4, 1/4, 2/4, 3/4.
    correct = np.array([True, False, True, True])
    # Best precision from a recall on: 1 up to 1/4, then 3/4 up to 3/4, then 0.
    assert average_precision(correct, 4, eleven_points=False) == pytest.approx(0.25 * 1 + 0.5 * 0.75)
    # Recall 0, .1, .2 -> 1; .3 to .7 -> 3/4; .8, .9, 1 -> 0.
    assert average_precision(correct, 4, eleven_points=True) == pytest.approx((3 * 1 + 5 * 0.75) / 11)
    assert average_precision(np.zeros(0, dtype=bool), 4, eleven_points=False) == 0
    assert average_precision(np.zeros(0, dtype=bool), 4, eleven_points=True) == 0


@pytest.mark.parametrize("positives", [10, 5, 20, 100])
def test_perfect_detection_has_ap_1(positives: int) -> None:
    for eleven_points in (True, False):
        assert average_precision(np.ones(positives, dtype=bool), positives, eleven_points) == pytest.approx(1)


@pytest.mark.parametrize("eleven_points", [True, False])
def test_a_second_detection_of_a_box_is_wrong(eleven_points: bool) -> None:
    detections = [found(1, BOX, 0.9), found(1, BOX, 0.8), found(1, FAR, 0.7)]
    result = voc_ap50(detections, truth((1, BOX, 0), (1, FAR, 0)), eleven_points)
    # Right, wrong, right: precision 1 at recall 1/2, then 2/3 at recall 1.
    expected = (6 * 1 + 5 * 2 / 3) / 11 if eleven_points else (1 + 2 / 3) / 2
    assert result["AP50"] == result["per_class"]["a"] == pytest.approx(expected)
    assert result["per_class"] == {"a": result["AP50"], "b": -1.0}


def test_difficult_boxes_neither_help_nor_hurt() -> None:
    detections = [found(1, FAR, 0.9), found(1, FAR, 0.8), found(1, BOX, 0.7)]
    assert voc_ap50(detections, truth((1, BOX, 0), (1, FAR, 1)))["AP50"] == 1
    assert voc_ap50(detections, truth((1, FAR, 1)))["AP50"] == -1


def test_scores_order_detections_across_images() -> None:
    detections = [found(1, BOX, 0.3), found(2, FAR, 0.6), found(3, BOX, 0.9)]
    # In order: wrong (image 3 has no box), right, right: precision 0, 1/2, 2/3; best from recall 1/2 on is 2/3.
    assert voc_ap50(detections, truth((1, BOX, 0), (2, FAR, 0)))["AP50"] == pytest.approx(2 / 3)


def test_iou_of_exactly_a_half_is_right() -> None:
    assert voc_ap50([found(1, [0, 0, 10, 5], 0.5)], truth((1, BOX, 0)))["AP50"] == 1
    assert voc_ap50([found(1, [0, 0, 10, 4.99], 0.5)], truth((1, BOX, 0)))["AP50"] == 0


def test_a_detection_belongs_to_the_box_it_overlaps_most() -> None:
    # The second detection overlaps the taken box most, so it is wrong, though IoU with the other is above a half too.
    near = [2, 0, 10, 10]
    detections = [found(1, BOX, 0.9), found(1, [0.5, 0, 10, 10], 0.8)]
    assert voc_ap50(detections, truth((1, BOX, 0), (1, near, 0)))["AP50"] == pytest.approx(0.5)


def test_other_classes_do_not_mix() -> None:
    assert voc_ap50([found(1, BOX, 0.9, category=2)], truth((1, BOX, 0)))["AP50"] == 0
    assert voc_ap50([], truth((1, BOX, 0)))["AP50"] == 0
