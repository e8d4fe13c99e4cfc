"""COCO files: what is read of good ones, and what is said of bad ones."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval

from defeat_cli.data.dataset import CocoDataset, find_split, open_split
from defeat_cli.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def content() -> dict[str, Any]:
    """Two images of 20x10 and 10x20 (width x height), ids with gaps, names not in the order of ids."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 20, "height": 10},
            {"id": 3, "file_name": "sub/b.png", "width": 10, "height": 20},
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 0, "name": "yak"}, {"id": 13, "name": "ant"}],
        "annotations": [
            {"id": 0, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 5.5, "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 0, "bbox": [0.5, 1.5, 10, 5]},
            {"id": 5, "image_id": 3, "category_id": 13, "bbox": [0, 0, 10, 20], "iscrowd": 1},
            {"id": 9, "image_id": 3, "category_id": 0, "bbox": [5, 5, 2, 2], "area": 4, "iscrowd": 0},
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in the simple layout, without annotation files."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    left_white = np.zeros((10, 20, 3), dtype=np.uint8)
    left_white[:, :4] = 255
    Image.fromarray(left_white).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (10, 20), "red").save(tmp_path / "images" / "sub" / "b.png")
    return tmp_path


def opened(folder: Path, what: Any, train: bool = True, **settings: Any) -> CocoDataset:
    text = what if isinstance(what, str) else json.dumps(what)
    (folder / "train.json").write_text(text)
    return CocoDataset(folder / "train.json", folder / "images", train, **settings)


def test_ids_of_any_kind_become_labels_ordered_by_id(folder: Path, capsys: pytest.CaptureFixture) -> None:
    data = opened(folder, content())
    assert data.classes == ["yak", "ant", "zebra"]
    assert data.category_ids == [0, 13, 90]
    assert data.image_ids == [7, 3]
    assert data.sizes == [(10, 20), (20, 10)]
    assert data.file_name(1) == "sub/b.png"
    first, second = data[0], data[-1]
    assert (first.image_id, second.image_id) == (7, 3)
    assert first.image.shape == (3, 10, 20)
    assert first.target["boxes"].tolist() == [[0.5, 1.5, 10.5, 6.5]]
    assert first.target["labels"].tolist() == [1]
    # The crowd is left out; the others keep the file's order.
    assert second.target["boxes"].tolist() == [[1, 2, 4, 6], [5, 5, 7, 7]]
    assert second.target["labels"].tolist() == [3, 1]
    assert (first.target["boxes"].dtype, first.target["labels"].dtype) == (torch.float32, torch.int64)
    assert [category["name"] for category in data.coco.loadCats([0, 13, 90])] == data.classes
    assert capsys.readouterr().out == ""


def test_ground_truth_is_what_the_file_says(folder: Path) -> None:
    what = content()
    what["annotations"] += [
        {"id": 20, "image_id": 7, "category_id": 0, "bbox": [-5, 0, 40, 12], "area": 480},
        {"id": 21, "image_id": 7, "category_id": 13, "bbox": [3, 3, 0, 4]},
        {"id": 22, "image_id": 7, "category_id": 13, "bbox": [9, 3, -2, 4]},
    ]
    data = opened(folder, what, train=False)
    rows = data.coco.dataset["annotations"]
    assert [row["bbox"] for row in rows] == [a["bbox"] for a in what["annotations"]]
    assert [row["iscrowd"] for row in rows] == [0, 0, 1, 0, 0, 0, 0]
    assert [row["area"] for row in rows] == [5.5, 50, 200, 4, 480, 0, 0]
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert any("2 boxes without area: still in the ground truth" in note for note in data.notes)


def test_evaluation_counts_a_match_with_annotation_id_0(folder: Path) -> None:
    # pycocotools alone would take annotation id 0 for "no match", and call the perfect detection wrong.
    what = content()
    what["annotations"] = [what["annotations"][0], {"id": 1, "image_id": 7, "category_id": 0, "bbox": [3, 3, 0, 0]}]
    coco = opened(folder, what, train=False).coco
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes([{"image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4], "score": 0.9}])
        scorer = COCOeval(coco, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    assert scorer.stats[0] == pytest.approx(0.5)  # zebra 1; yak 0, its only box being degenerate; ant has none


def test_string_ids(folder: Path) -> None:
    what = content()
    what["images"] = [{**image, "id": f"img{image['id']}"} for image in what["images"]]
    what["annotations"] = [{**a, "image_id": f"img{a['image_id']}"} for a in what["annotations"]]
    data = opened(folder, what)
    assert data[1].image_id == "img3"
    assert len(data[1].target["labels"]) == 2


def test_boxes_are_clipped_and_degenerate_ones_dropped(folder: Path) -> None:
    what = content()
    boxes = [[-5, -1, 10, 5], [15, 5, 100, 100], [3, 3, 0, 4], [30, 3, 5, 5], [4, 4, 2, 0.05], [19.5, 0, 1, 10.2]]
    what["annotations"] = [
        {"id": i, "image_id": 7, "category_id": 0, "bbox": box} for i, box in enumerate(boxes, start=1)
    ]
    data = opened(folder, what)
    # Kept: two clipped ones and the last, which sticks out by less than a pixel.
    assert data[0].target["boxes"].tolist() == [[0, 0, 5, 4], [15, 5, 20, 10], [19.5, 0, 20, 10]]
    assert data[1].target["boxes"].shape == (0, 4)
    assert data[1].target["labels"].shape == (0,)
    notes = "\n".join(data.notes)
    assert "3 boxes reach beyond the image" in notes  # the two, and the one wholly outside
    assert "3 boxes without area: left out of training" in notes
    assert "2 of 3 classes have no box: ant, zebra" in notes
    assert "1 image has no box; used as background" in notes
    assert len(data.notes) == 4


def test_clean_data_has_no_notes(folder: Path) -> None:
    what = content()
    what["annotations"][2]["iscrowd"] = 0
    assert opened(folder, what).notes == []


def test_data_without_any_box(folder: Path) -> None:
    what = {**content(), "annotations": []}
    data = opened(folder, what)
    assert len(data) == 2
    assert data[0].target["boxes"].shape == (0, 4)
    assert data.coco.getAnnIds() == []


def test_sizes_are_read_from_images_where_the_file_has_none(folder: Path) -> None:
    what = content()
    for image in what["images"]:
        del image["width"], image["height"]
    data = opened(folder, what)
    assert data.sizes == [(10, 20), (20, 10)]
    assert data.coco.loadImgs([7])[0]["width"] == 20


def test_flip_is_decided_by_seed_epoch_and_index(folder: Path) -> None:
    data = opened(folder, content(), flip=0.5, seed=3)
    plain = opened(folder, content())[0]
    flips = []
    for epoch in range(20):
        sample = data[(epoch, 0)]
        again = data[(epoch, 0)]
        assert sample.image.equal(again.image)
        flips.append(bool(sample.image[0, 0, -1] == 255))
        expected = [[9.5, 1.5, 19.5, 6.5]] if flips[-1] else plain.target["boxes"].tolist()
        assert sample.target["boxes"].tolist() == expected
    assert 4 <= sum(flips) <= 16
    assert flips != [
        bool(opened(folder, content(), flip=0.5, seed=4)[(e, 0)].image[0, 0, -1] == 255) for e in range(20)
    ]


def test_no_flip_outside_training(folder: Path) -> None:
    data = opened(folder, content(), train=False, flip=1.0)
    assert data[0].target["boxes"].tolist() == [[0.5, 1.5, 10.5, 6.5]]


def test_samples_are_copies(folder: Path) -> None:
    data = opened(folder, content())
    data[0].target["boxes"].zero_()
    assert data[0].target["boxes"].tolist() == [[0.5, 1.5, 10.5, 6.5]]


def test_survives_pickling(folder: Path) -> None:
    data = pickle.loads(pickle.dumps(opened(folder, content())))  # noqa: S301 (our own bytes)
    assert data[1].target["labels"].tolist() == [3, 1]


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    what = content()
    replaced = change(what)
    return what if replaced is None else replaced


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [], r"train\.json: not COCO annotations: needs lists images, annotations, categories; found a list"),
        (lambda c: c.pop("annotations") and None, r"needs lists .*; found images, categories"),
        (lambda c: c.update(images=[]), r"train\.json: images is empty"),
        (lambda c: c.update(categories=[]), r"categories is empty"),
        (lambda c: c["images"][1].update(id=7), r"images: id 7 is there more than once"),
        (lambda c: c["images"][1].update(id="7"), r"images: ids are numbers here and text there"),
        (lambda c: c["images"][0].pop("file_name") and None, r"images\[0\] \(id 7\): file_name is missing"),
        (lambda c: c["images"][0].update(width="20"), r"images\[0\] \(id 7\): height and width must be numbers"),
        (lambda c: c["images"].append(3), r"images\[2\]: is a int, not an object"),
        (lambda c: c["categories"][1].update(id=90), r"categories: id 90 is there more than once"),
        (lambda c: c["categories"][1].update(name="ant"), r"categories: name 'ant' is there more than once"),
        (lambda c: c["categories"][2].update(name=4), r"categories\[2\] \(id 13\): name must be text, found 4"),
        (lambda c: c["annotations"][1].update(image_id=8), r"annotations\[1\] \(id 5\): image_id 8 is not the id of"),
        (
            lambda c: c["annotations"][1].update(category_id=1),
            r"annotations\[1\] \(id 5\): category_id 1 is not the id",
        ),
        (lambda c: c["annotations"][1].update(category_id=[1]), r"category_id must be a number, found \[1\]"),
        (lambda c: c["annotations"][1].pop("image_id") and None, r"annotations\[1\] \(id 5\): image_id is missing"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, 3]),
            r"annotations\[1\] .*bbox must be four numbers.*found \[1, 2",
        ),
        (lambda c: c["annotations"][1].update(bbox=["1", 2, 3, 4]), r"bbox must be four numbers"),
        (lambda c: c["annotations"][1].pop("bbox") and None, r"bbox must be four numbers.*; there is none"),
        (
            lambda c: c["annotations"][3].update(bbox=[1, 2, float("nan"), 4]),
            r"annotations\[3\]: bbox .* is not finite",
        ),
        (lambda c: c["annotations"][3].update(area="big"), r"area must be a number, found 'big'"),
    ],
)
def test_bad_content_gets_one_clear_message(folder: Path, change: Callable, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(folder, broken(change))
    assert "\n" not in str(caught.value)


def test_broken_json_is_named_with_its_line(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train\.json:3: not valid JSON: Expecting.*\(column 13\)"):
        opened(folder, '{\n "images": [],\n "annotations": oops\n}'.replace('"annotations": ', '"annotat": '))
    (folder / "train.json").write_bytes(b'{"images": "\xff\xfe\xfd"}')
    with pytest.raises(DataError, match=r"train\.json: not valid JSON: not text in UTF-8"):
        CocoDataset(folder / "train.json", folder / "images", train=True)
    with pytest.raises(DataError, match=r"nothing\.json: cannot be read: No such file"):
        CocoDataset(folder / "nothing.json", folder / "images", train=True)


def test_missing_images_are_counted_and_named_at_once(folder: Path) -> None:
    what = content()
    what["images"] += [{"id": 100 + i, "file_name": f"gone/{i}.jpg"} for i in range(5)]
    with pytest.raises(
        DataError, match=r"5 of its 7 images are not in .*images: gone/0.jpg, gone/1.jpg, gone/2.jpg, …"
    ):
        opened(folder, what)


def test_a_corrupt_image_is_named_when_read(folder: Path) -> None:
    data = opened(folder, content())
    (folder / "images" / "a.png").write_bytes((folder / "images" / "a.png").read_bytes()[:50])
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        data[0]


def test_find_split_in_both_layouts_and_with_overrides(tmp_path: Path) -> None:
    official, simple = tmp_path / "official", tmp_path / "simple"
    for path in (official / "val2017", official / "annotations", simple / "images", simple / "other"):
        path.mkdir(parents=True)
    for path in (official / "annotations/instances_val2017.json", simple / "val.json", simple / "mine.json"):
        path.write_text("{}")
    assert find_split(official, "val") == (official / "annotations/instances_val2017.json", official / "val2017")
    assert find_split(simple, "val") == (simple / "val.json", simple / "images")
    assert find_split(simple, "val", annotations="mine.json") == (simple / "mine.json", simple / "images")
    assert find_split(simple, "val", images="other") == (simple / "val.json", simple / "other")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        find_split(tmp_path / "nowhere", "val")
    with pytest.raises(DataError) as caught:
        find_split(simple, "train")
    assert "no train data there" in str(caught.value)
    assert f"{simple / 'annotations/instances_train2017.json'} (not there) with {simple / 'train2017'}" in str(
        caught.value
    )
    assert f"{simple / 'train.json'} (not there) with {simple / 'images'}/" in str(caught.value)


def test_open_split_in_the_simple_layout(folder: Path) -> None:
    (folder / "val.json").write_text(json.dumps(content()))
    data = open_split(folder, "val", train=False)
    assert data.classes == ["yak", "ant", "zebra"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
@pytest.mark.parametrize(("name", "images", "boxes"), [("bccd", 72, 945), ("coco_mini", 600, 5587)])
def test_real_data(name: str, images: int, boxes: int) -> None:
    data = open_split(SHARED / name, "val", train=False)
    assert len(data) == images
    assert len(data.coco.dataset["annotations"]) == boxes
    read = json.loads((SHARED / name / "val.json").read_text())
    by_id = {category["id"]: category["name"] for category in read["categories"]}
    for index in (0, images // 2, images - 1):
        sample = data[index]
        assert sample.image.shape[1:] == data.sizes[index]
        mine = [a for a in read["annotations"] if a["image_id"] == sample.image_id and not a["iscrowd"]]
        assert [data.classes[label - 1] for label in sample.target["labels"]] == [by_id[a["category_id"]] for a in mine]
        corners = torch.tensor([a["bbox"] for a in mine]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        torch.testing.assert_close(sample.target["boxes"], corners, atol=0.05, rtol=0)
