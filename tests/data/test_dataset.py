"""Data sets: samples, ground truth, and what is said and refused of the whole of them."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.layouts import content
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from defeat_cli.data.annotations import parse_annotations
from defeat_cli.data.dataset import DetectionDataset, overlap
from defeat_cli.data.transforms import RandomFlip
from defeat_cli.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The images of `content`."""
    (tmp_path / "sub").mkdir()
    left_white = np.zeros((10, 20, 3), dtype=np.uint8)
    left_white[:, :4] = 255
    Image.fromarray(left_white).save(tmp_path / "a.png")
    Image.new("RGB", (10, 20), "red").save(tmp_path / "sub" / "b.png")
    return tmp_path


def opened(folder: Path, what: Any, train: bool = True, flip: float = 0.0, seed: int = 0) -> DetectionDataset:
    transforms = [RandomFlip(flip)] if flip else []
    return DetectionDataset(parse_annotations(what, "train.json"), folder, train, transforms, seed)


def with_boxes(*boxes: list[float]) -> dict[str, Any]:
    rows = [{"id": i, "image_id": 7, "category_id": 0, "bbox": box} for i, box in enumerate(boxes, start=1)]
    return {**content(), "annotations": rows}


def scored(coco: COCO, detections: list[dict[str, Any]]) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats


def test_samples(folder: Path, capsys: pytest.CaptureFixture) -> None:
    data = opened(folder, content())
    assert data.file_name(1) == "sub/b.png"
    first, second = data[0], data[-1]
    assert (first.image_id, second.image_id) == (2, 1)  # in the order of the ids 7 and 3
    assert first.image.shape == (3, 10, 20)
    assert first.target["boxes"].tolist() == [[0.5, 1.5, 10.5, 6.5]]
    assert first.target["labels"].tolist() == [1]
    # The crowd is left out; the others keep the file's order.
    assert second.target["boxes"].tolist() == [[1, 2, 4, 6], [5, 5, 7, 7]]
    assert second.target["labels"].tolist() == [3, 1]
    assert (first.target["boxes"].dtype, first.target["labels"].dtype) == (torch.float32, torch.int64)
    assert [category["name"] for category in data.coco.loadCats([1, 2, 3])] == data.classes
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
    data = opened(folder, what, train=False)
    stats = scored(data.coco, [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.9}])
    assert stats[0] == pytest.approx(0.5)  # zebra 1; yak 0, its only box being degenerate; ant has none


@pytest.mark.parametrize("ids", [(7, 3), (2**60 + 1, 2**60), ("img7", "img3")])
def test_image_ids_of_any_size_are_scored_and_go_back(folder: Path, ids: tuple) -> None:
    """The figures are those of small ids, which pycocotools alone gets right."""
    what = content()
    new = dict(zip((7, 3), ids, strict=True))
    what["images"] = [{**row, "id": new[row["id"]]} for row in what["images"]]
    what["annotations"] = [{**row, "image_id": new[row["image_id"]]} for row in what["annotations"]]
    data = opened(folder, what, train=False)
    found = [
        {"image_id": data[0].image_id, "category_id": 1, "bbox": [0.5, 1.5, 10, 4.5], "score": 0.5},
        {"image_id": data[1].image_id, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.9},
    ]
    own = data.in_own_ids(found)
    assert [(d["image_id"], d["category_id"]) for d in own] == [(ids[0], 0), (ids[1], 90)]
    small = dict(zip(ids, (7, 3), strict=True))
    plain = COCO()
    plain.dataset = json.loads(json.dumps(content()))
    for i, row in enumerate(plain.dataset["annotations"], start=1):
        row.update(id=i, iscrowd=row.get("iscrowd", 0), area=row.get("area", row["bbox"][2] * row["bbox"][3]))
    with contextlib.redirect_stdout(io.StringIO()):
        plain.createIndex()
    expected = scored(plain, [{**d, "image_id": small[d["image_id"]]} for d in own])
    assert scored(data.coco, found).tolist() == expected.tolist()
    assert expected[0] > 0.1


def test_boxes_are_clipped_and_degenerate_ones_dropped(folder: Path) -> None:
    what = with_boxes(
        [-5, -1, 10, 5], [15, 5, 100, 100], [3, 3, 0, 4], [30, 3, 5, 5], [4, 4, 2, 0.05], [19.5, 0, 1, 10.2]
    )
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


def test_boxes_of_images_of_another_size_are_told(folder: Path) -> None:
    large = with_boxes([30, 15, 5, 20], [2, 2, 30, 5], [12, 8, 20, 20], [1, 1, 2, 2])
    assert any("3 of 4 boxes reach beyond their images" in note for note in opened(folder, large, train=False).notes)
    del large["annotations"][0]
    large["annotations"].append({"id": 9, "image_id": 7, "category_id": 0, "bbox": [1, 1, 2, 2]})
    assert not any("their images" in note for note in opened(folder, large, train=False).notes)


def test_clean_data_has_no_notes(folder: Path) -> None:
    what = content()
    what["annotations"][2]["iscrowd"] = 0
    assert opened(folder, what).notes == []


def test_classes_that_differ_by_case_are_told(folder: Path) -> None:
    what = content()
    what["categories"] += [{"id": 100 + i, "name": name} for i, name in enumerate(("Yak", "a", "A"))]
    assert any("by case alone are classes of their own: yak, Yak" in note for note in opened(folder, what).notes)


def test_data_without_any_box_is_refused(folder: Path) -> None:
    data = opened(folder, with_boxes())
    assert len(data) == 2
    assert data[0].target["boxes"].shape == (0, 4)
    with pytest.raises(DataError, match=r"train\.json: the test images have no boxes: nothing to learn"):
        data.refuse_boxless("test")
    with pytest.raises(DataError, match="images have no boxes but 1 crowd or box without area"):
        opened(folder, with_boxes([1, 1, 0, 0])).refuse_boxless("training")
    opened(folder, with_boxes([1, 1, 2, 2])).refuse_boxless("training")


def test_boxes_that_are_shares_of_the_image_are_recognised(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train\.json: all its boxes are within 0\.\.1.*the first is \[0\.1, 0\.2"):
        opened(folder, with_boxes([0.1, 0.2, 0.5, 0.5], [0, 0, 1, 1]))
    opened(folder, with_boxes([0.1, 0.2, 0.5, 0.5], [0, 0, 10, 5]))  # a small one among others
    opened(folder, with_boxes([0, 0, 0, 0]))


def test_boxes_that_are_corners_are_recognised(folder: Path) -> None:
    corners = [[12, 2, 19, 9], [1, 4, 9, 10], [3, 1, 18, 8], [11, 0, 20, 5]]
    with pytest.raises(DataError, match=r"3 of its 4 boxes leave their images, and all fit as corners \[x1, y1, x2"):
        opened(folder, with_boxes(*corners))
    as_sides = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in corners]
    assert opened(folder, with_boxes(*as_sides))[0].target["boxes"].tolist() == corners
    # One box that cannot be corners, or boxes that all stay inside, are what they say.
    opened(folder, with_boxes(*corners, [12, 2, 5, 5]))
    opened(folder, with_boxes([2, 1, 9, 6], [1, 2, 11, 5], [0, 0, 20, 10]))


def test_an_image_listed_twice_is_refused(folder: Path) -> None:
    what = content()
    what["images"].append({"id": 8, "file_name": "sub/../a.png"})
    with pytest.raises(DataError, match=r"train\.json: image sub/\.\./a\.png is listed twice, with ids 7 and 8"):
        opened(folder, what)


@pytest.mark.parametrize(("size", "fine"), [((1, 1333), True), ((1, 1334), False), ((3000, 2), False)])
def test_images_of_which_nothing_is_left_are_refused(folder: Path, size: tuple[int, int], fine: bool) -> None:
    """As torchvision resizes: the short side to 800 unless the long one exceeds 1333, sides rounded down."""
    Image.new("RGB", size).save(folder / "thin.png")
    what = content()
    what["images"].append({"id": 9, "file_name": "thin.png"})
    data = opened(folder, what)
    if fine:
        data.refuse_vanishing([1000, 800], 1333)
    else:
        with pytest.raises(DataError, match=rf"thin\.png: is {size[0]}x{size[1]} .* its short side is 0 pixels"):
            data.refuse_vanishing([1000, 800], 1333)


def test_sizes_are_read_from_images_where_the_file_has_none(folder: Path) -> None:
    what = content()
    for image in what["images"]:
        del image["width"], image["height"]
    data = opened(folder, what)
    assert data.sizes == [(10, 20), (20, 10)]
    assert data.coco.loadImgs([2])[0]["width"] == 20


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
        assert flips[-1] == (np.random.default_rng((3, epoch, 0)).random() < 0.5)
    assert 4 <= sum(flips) <= 16
    other = opened(folder, content(), flip=0.5, seed=4)
    assert flips != [bool(other[(e, 0)].image[0, 0, -1] == 255) for e in range(20)]


def test_transforms_are_applied_in_turn_with_one_generator(folder: Path) -> None:
    drawn = []

    def draw(image: torch.Tensor, target: dict, rng: np.random.Generator) -> tuple[torch.Tensor, dict]:
        drawn.append(rng.random())
        return image + 1, target

    data = DetectionDataset(parse_annotations(content(), "a"), folder, True, [draw, RandomFlip(1), draw], seed=5)
    rng = np.random.default_rng((5, 2, 0))
    expected = [rng.random() for _ in range(3)]
    image = data[(2, 0)].image
    assert drawn == [expected[0], expected[2]]
    assert image[0, 0].tolist() == [2] * 16 + [1] * 4  # white (255) has become 1, and stands at the right


def test_samples_are_copies(folder: Path) -> None:
    data = opened(folder, content())
    data[0].target["boxes"].zero_()
    assert data[0].target["boxes"].tolist() == [[0.5, 1.5, 10.5, 6.5]]


def test_survives_pickling(folder: Path) -> None:
    data = pickle.loads(pickle.dumps(opened(folder, content(), flip=0.5)))  # noqa: S301 (our own bytes)
    assert data[1].target["labels"].tolist() == [3, 1]


def test_missing_images_are_counted_and_named_at_once(folder: Path) -> None:
    what = content()
    what["images"] += [{"id": 100 + i, "file_name": f"gone/{i}.jpg"} for i in range(5)]
    with pytest.raises(DataError, match=r"5 of 7 images are not in .*: gone/0.jpg, gone/1.jpg, gone/2.jpg and 2 m"):
        opened(folder, what)
    what = content()
    what["images"][0]["file_name"] = f"{'x' * 5000}\0.jpg"
    with pytest.raises(DataError, match="1 of 2 images is not in"):
        opened(folder, what)


def test_a_corrupt_image_is_named_when_read(folder: Path) -> None:
    data = opened(folder, content())
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:50])
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        data[0]


def test_validation_images_among_the_training_images_are_told(folder: Path, tmp_path: Path) -> None:
    train, only_first = content(), content()
    only_first["images"] = only_first["images"][:1]
    only_first["annotations"] = only_first["annotations"][1:2]
    val = opened(folder, only_first, train=False)
    assert "1 of 1 validation image is a training image too (a.png)" in overlap(opened(folder, train), val)
    # A copy elsewhere, with the same boxes; with others it may be another image of that name.
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.png").write_bytes((folder / "a.png").read_bytes())
    assert "1 of 1" in overlap(opened(folder, train), opened(tmp_path / "copy", only_first))
    only_first["annotations"][0]["bbox"] = [1, 1, 2, 2]
    assert overlap(opened(folder, train), opened(tmp_path / "copy", only_first)) is None
