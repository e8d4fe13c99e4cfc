"""COCO's JSON files in every layout that people and labelling tools give them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data.layouts import coco_of, write_coco, write_images, write_text

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.opening import open_split
from defeat_cli.errors import DataError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def files(data: DetectionDataset) -> list[Path]:
    """Where the images really are."""
    return [data.images / data.file_name(i) for i in range(len(data))]


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("annotations/instances_{}2014.json", "{}2014"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/instances_{}.json", "images"),
        ("annotations/{}.json", "images/{}"),
        ("{}.json", "images"),
        ("{}.json", "{}"),
        ("{}.json", "{}/images"),
        ("{}.json", "."),
        ("{}_annotations.json", "JPEGImages"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}/annotations.json", "{}/images"),
    ],
)
def test_layouts(tmp_path: Path, annotations: str, images: str) -> None:
    """Each with both splits, whose images are called alike where the layout has folders for them."""
    for split in ("train", "val"):
        name = "a.jpg" if "{}" in images else f"{split}.jpg"
        write_images(tmp_path / images.format(split), name)
        write_coco(tmp_path / annotations.format(split), name)
    for split in ("train", "val"):
        data = open_split(tmp_path, split, train=False)
        name = "a.jpg" if "{}" in images else f"{split}.jpg"
        assert files(data) == [tmp_path / images.format(split) / name]
        assert data[0].target["boxes"].tolist() == [[2, 1, 8, 5]]
        assert data.notes == []


def test_roboflow(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "dogs", "supercategory": "none"},
        {"id": 1, "name": "dog", "supercategory": "dogs"},
    ]
    for split in ("train", "valid", "test"):
        write_images(tmp_path / split, "a.jpg")
        write_coco(tmp_path / split / "_annotations.coco.json", "a.jpg", categories=categories)
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        data = open_split(tmp_path, split, train=False)
        assert files(data) == [tmp_path / folder / "a.jpg"]
        assert (data.classes, data.annotations.category_ids) == (["dog"], [1])
        assert any("category 'dogs' (id 0) is the parent of all others" in note for note in data.notes)


@pytest.mark.parametrize(
    "names",
    [
        ["images/default/{}.jpg", "task 1/{}.jpg"],  # CVAT
        ["/data/local-files/?d=project%201/{}.jpg", "/data/local-files/?d=b/{}.jpg"],  # Label Studio
        ["http://127.0.0.1:8080/data/upload/3/{}.jpg?token=x#y", "s3://bucket/deep/{}.jpg"],
        ["..\\images\\{}.jpg", "C:\\Users\\me\\{}.jpg"],
        ["/home/me/set/{}.jpg", "file:///home/me/set/{}.jpg"],
    ],
)
def test_names_with_folders_or_urls_of_elsewhere(tmp_path: Path, names: list[str]) -> None:
    write_images(tmp_path / "pictures", "deep/a.jpg", "b.jpg")
    named = [name.format(stem) for name, stem in zip(names, "ab", strict=True)]
    write_coco(tmp_path / "result.json", *named)
    data = open_split(tmp_path, "train", annotations="result.json", train=False)
    assert files(data) == [tmp_path / "pictures/deep/a.jpg", tmp_path / "pictures/b.jpg"]
    assert any(f"{named[0]} is pictures/deep/a.jpg" in note for note in data.notes)


def test_names_that_label_studio_put_digits_before(tmp_path: Path) -> None:
    """As it exports files that were uploaded, while whoever labelled them has them by their own names."""
    write_images(tmp_path / "images", "cat-1.jpg", "deadbeef-b.jpg", "c.jpg")
    names = ("534f0edd-cat-1.jpg", "deadbeef-b.jpg", "0a1b2c3d-c.jpg")
    write_coco(tmp_path / "result.json", *(f"/data/upload/3/{name}" for name in names))
    data = open_split(tmp_path, "train", annotations="result.json", train=False)
    assert files(data) == [tmp_path / "images" / name for name in ("cat-1.jpg", "deadbeef-b.jpg", "c.jpg")]
    write_coco(tmp_path / "result.json", "/data/upload/3/534f0edd-c.jpg", "/data/upload/3/0a1b2c3d-c.jpg")
    with pytest.raises(DataError, match=r"image images/c\.jpg is listed twice, with ids"):
        open_split(tmp_path, "train", annotations="result.json", train=False)


def test_of_files_called_alike_the_one_whose_folders_agree_is_taken(tmp_path: Path) -> None:
    write_images(tmp_path, "x/left/a.jpg", "x/right/a.jpg")
    write_coco(tmp_path / "train.json", "/old/place/right/a.jpg")
    assert files(open_split(tmp_path, "train", train=False)) == [tmp_path / "x/right/a.jpg"]
    write_coco(tmp_path / "train.json", "/old/place/a.jpg")
    with pytest.raises(DataError, match=r"'/old/place/a\.jpg' can be x/left/a\.jpg or x/right/a\.jpg in"):
        open_split(tmp_path, "train", train=False)


def test_keypoints_and_captions_beside_are_not_taken(tmp_path: Path) -> None:
    write_images(tmp_path / "train2014", "a.jpg")
    for kind in ("instances", "person_keypoints"):
        write_coco(tmp_path / f"annotations/{kind}_train2014.json", "a.jpg")
    write_text(tmp_path / "annotations/captions_train2014.json", '{"images": [], "annotations": []}')
    data = open_split(tmp_path, "train", train=True)
    assert data.annotations.origin.endswith("instances_train2014.json")


def test_one_file_is_divided(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(10)]
    write_images(tmp_path / "images", *names)
    write_coco(tmp_path / "annotations/instances_default.json", *names)
    for path in (tmp_path, tmp_path / "annotations/instances_default.json"):
        if path.is_file():
            write_images(path.parent, *names)
        parts = [open_split(path, split, train=False, val_fraction=0.3) for split in ("train", "val")]
        assert [len(part) for part in parts] == [7, 3]
    with pytest.raises(DataError, match=r"no val data there.*found annotations/instances_default\.json.*data\.val"):
        open_split(tmp_path, "val", train=False)
    write_coco(tmp_path / "other.json", *names)
    with pytest.raises(
        DataError, match=r"several annotation files can be the train data: annotations/inst.*, other\.json"
    ):
        open_split(tmp_path, "train", train=False, val_fraction=0.3)


def test_files_and_folders_that_the_user_names(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "a.jpg")
    write_images(tmp_path / "other", "a.jpg")
    write_coco(tmp_path / "train.json", "a.jpg")
    write_coco(tmp_path / "mine.json", "a.jpg")
    assert files(open_split(tmp_path, "train", annotations="mine.json", train=False)) == [tmp_path / "images/a.jpg"]
    assert files(open_split(tmp_path, "train", images="other", train=False)) == [tmp_path / "other/a.jpg"]
    absolute = str(tmp_path / "mine.json")
    assert files(open_split(tmp_path, "val", annotations=absolute, train=False)) == [tmp_path / "images/a.jpg"]
    with pytest.raises(DataError, match=r"gone: no such folder \(data\.train_images\)"):
        open_split(tmp_path, "train", images="gone", train=False)
    write_images(tmp_path / "empty", "b.jpg")
    with pytest.raises(DataError, match=r"not one of its 1 image is there .* anywhere in .*empty; name the folder"):
        open_split(tmp_path, "train", images="empty", train=False)
    with pytest.raises(
        DataError, match=r"gone\.json: no such file; .* holds empty, images, mine\.json, other, train\.json"
    ):
        open_split(tmp_path, "train", annotations="gone.json", train=False)


def test_bad_cases_are_named(tmp_path: Path) -> None:
    write_coco(tmp_path / "train.json", "a.jpg")
    with pytest.raises(DataError, match=r"train\.json: not one of its 1 image is there \(a\.jpg\)\. Looked in"):
        open_split(tmp_path, "train", train=False)
    with pytest.raises(DataError, match=r"no val data there\. Looked for annotations/instances_val2017\.json, val"):
        open_split(tmp_path, "val", train=False)
    write_images(tmp_path / "images", "b.jpg")
    write_text(tmp_path / "train.json", json.dumps(coco_of("a.jpg", "b.jpg")))
    with pytest.raises(DataError, match=r"train\.json: 1 of 2 images is not in .*images: a\.jpg"):
        open_split(tmp_path, "train", train=False)


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
        (own,) = data.in_own_ids([{"image_id": sample.image_id, "category_id": 1}])
        mine = [a for a in read["annotations"] if a["image_id"] == own["image_id"] and not a["iscrowd"]]
        assert [data.classes[label - 1] for label in sample.target["labels"]] == [by_id[a["category_id"]] for a in mine]
        corners = torch.tensor([a["bbox"] for a in mine]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        torch.testing.assert_close(sample.target["boxes"], corners, atol=0.05, rtol=0)
