"""COCO files: what is read of good ones, of ones whose meaning is clear all the same, and what is said of bad ones."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.layouts import content

from defeat_cli.data import reading
from defeat_cli.data.annotations import Annotations, parse_annotations, read_annotations
from defeat_cli.errors import DataError


def same(one: Annotations, other: Annotations) -> bool:
    """Whether all but the origin is equal."""
    return all(np.array_equal(getattr(one, key), value) for key, value in vars(other).items() if key != "origin")


def test_ids_of_any_kind_become_labels_ordered_by_id() -> None:
    read = parse_annotations(content(), "a")
    assert (read.classes, read.category_ids) == (["yak", "ant", "zebra"], [0, 13, 90])
    assert (read.image_ids, read.file_names, read.sizes) == ([7, 3], ["a.png", "sub/b.png"], [(10, 20), (20, 10)])
    assert (read.images.tolist(), read.labels.tolist()) == ([1, 0, 1, 1], [3, 1, 2, 1])
    assert read.boxes.tolist() == [[1, 2, 3, 4], [0.5, 1.5, 10, 5], [0, 0, 10, 20], [5, 5, 2, 2]]
    assert (read.areas.tolist(), read.crowd.tolist()) == ([5.5, 50, 200, 4], [False, False, True, False])


@pytest.mark.parametrize("order", [["images", "annotations", "categories"], ["annotations", "categories", "images"]])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_file_is_read_in_whatever_order_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[str], chunk: int
) -> None:
    monkeypatch.setattr(reading, "CHUNK", chunk)
    monkeypatch.setattr("defeat_cli.data.annotations.read_json", lambda _: pytest.fail("read at once"))
    whole = {"info": {"a": [1, {"b": 2.5}]}, **{key: content()[key] for key in order}, "licenses": [], "x": 12}
    (tmp_path / "a.json").write_text(json.dumps(whole, indent=chunk % 3))
    assert same(read_annotations(tmp_path / "a.json"), parse_annotations(content(), "a"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    what = content()
    what["categories"][0]["name"] = "Zèbre 斑马"
    (tmp_path / "a.json").write_text(json.dumps(what, ensure_ascii=False), encoding=encoding)
    assert read_annotations(tmp_path / "a.json").classes[-1] == "Zèbre 斑马"


def change(key: str, position: int, **values: Any) -> Callable[[dict], None]:
    return lambda what: what[key][position].update(values)


@pytest.mark.parametrize(
    "clear",
    [
        change("images", 0, id=7.0, width="20", height=10.0),
        change("annotations", 1, image_id="7"),
        change("annotations", 1, image_id=7.0, category_id="0"),
        change("annotations", 0, bbox=["1", 2, "3.0", 4.0], area="5.5"),
        change("annotations", 0, iscrowd="0"),
        change("annotations", 0, iscrowd=False),
        change("annotations", 0, iscrowd=None),
        change("annotations", 2, iscrowd="1"),
        change("annotations", 2, iscrowd=True),
        change("annotations", 1, area=None),
        lambda what: what["annotations"][0].pop("iscrowd"),
    ],
)
def test_what_is_of_another_type_and_clear_is_read(clear: Callable[[dict], None]) -> None:
    what = content()
    clear(what)
    assert same(parse_annotations(what, "a"), parse_annotations(content(), "a"))


def test_text_ids_and_numbers_as_names() -> None:
    what = content()
    for image in what["images"]:
        image["id"] = str(image["id"])
    what["categories"][0]["name"] = 4  # a data set of digits
    read = parse_annotations(what, "a")
    assert read.image_ids == ["7", "3"]
    assert read.images.tolist() == [1, 0, 1, 1]  # whose image_id are numbers
    assert read.classes == ["yak", "ant", "4"]
    what["images"][0]["id"] = "07"
    with pytest.raises(DataError, match=r"annotations\[1\] \(id 5\): image_id 7 is not the id of one of its images"):
        parse_annotations(what, "a")


def test_large_ids_are_kept() -> None:
    what = content()
    large = {7: 2**60 + 1, 3: 2**60}
    for row, key in [(row, "id") for row in what["images"]] + [(row, "image_id") for row in what["annotations"]]:
        row[key] = large[row[key]]
    assert parse_annotations(what, "a").image_ids == [2**60 + 1, 2**60]
    assert parse_annotations(what, "a").images.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("name", ["animals", "yak"])
def test_the_parent_that_roboflow_adds_is_dropped_and_said(name: str) -> None:
    what = content()
    what["categories"] = [
        {**category, "id": category["id"] + 1, "supercategory": name} for category in what["categories"]
    ]
    for annotation in what["annotations"]:
        annotation["category_id"] += 1
    what["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"})
    read = parse_annotations(what, "a")
    assert (read.classes, read.category_ids) == (["yak", "ant", "zebra"], [1, 14, 91])
    assert read.labels.tolist() == [3, 1, 2, 1]
    assert read.notes == (f"category {name!r} (id 0) is the parent of all others and has no box: left out",)
    what["annotations"][0]["category_id"] = 0
    if name == "animals":  # in use it is a class
        assert parse_annotations(what, "a").classes == ["animals", "yak", "ant", "zebra"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda c: [], r"a: not COCO annotations: needs lists images, annotations, categories; found a list"),
        (lambda c: [{"image_id": 1, "score": 0.5}], r"found a list of detections: these are results"),
        (lambda c: {"shapes": [], "imagePath": "a.jpg"}, r"found shapes, imagePath; this looks like a LabelMe file"),
        (lambda c: c.pop("annotations") and None, r"needs lists .*; found images, categories"),
        (lambda c: c.update(images={"a": 1}), r"found images \(a mapping\), categories, annotations"),
        (lambda c: c.update(categories=None), r"categories \(nothing\)"),
        (lambda c: c.update(images=[]), r"a: images is empty"),
        (lambda c: c.update(categories=[]), r"categories is empty"),
        (change("images", 1, id=7), r"images: id 7 is there more than once"),
        (change("images", 1, id=7.0), r"images: id 7 is there more than once"),
        (change("images", 1, id="7"), r"images: ids are numbers here and text there"),
        (change("images", 1, id=True), r"images\[1\] \(id True\): id must be a number, found True"),
        (change("images", 1, id=1.5), r"images\[1\] \(id 1.5\): id must be a number, found 1.5"),
        (lambda c: c["images"][0].pop("file_name") and None, r"images\[0\] \(id 7\): file_name is missing"),
        (change("images", 0, width="wide"), r"images\[0\] \(id 7\): width must be a number of pixels, found 'wide'"),
        (change("images", 0, height=10.5), r"images\[0\] \(id 7\): height must be a number of pixels, found 10.5"),
        (lambda c: c["images"].append(3), r"images\[2\]: is a number, not a mapping"),
        (change("categories", 1, id=90), r"categories: id 90 is there more than once"),
        (change("categories", 1, name="ant"), r"categories: name 'ant' is there more than once"),
        (change("categories", 2, name=[4]), r"categories\[2\] \(id 13\): name must be text, found \[4\]"),
        (change("annotations", 1, image_id=8), r"annotations\[1\] \(id 5\): image_id 8 is not the id of"),
        (change("annotations", 1, category_id=1), r"annotations\[1\] \(id 5\): category_id 1 is not the id"),
        (change("annotations", 1, category_id=[1]), r"category_id must be a number, found \[1\]"),
        (lambda c: c["annotations"][1].pop("image_id") and None, r"annotations\[1\] \(id 5\): image_id is missing"),
        (change("annotations", 1, bbox=[1, 2, 3]), r"annotations\[1\] .*bbox must be four numbers.*found \[1, 2"),
        (change("annotations", 1, bbox=["one", 2, 3, 4]), r"bbox must be four finite numbers.*found \['one'"),
        (change("annotations", 1, bbox=[True, 2, 3, 4]), r"bbox must be four finite numbers"),
        (change("annotations", 1, bbox=[10**400, 2, 3, 4]), r"bbox must be four finite numbers"),
        (lambda c: c["annotations"][1].pop("bbox") and None, r"bbox must be four numbers.*; there is none"),
        (change("annotations", 3, bbox=[1, 2, math.nan, 4]), r"annotations\[3\] \(id 9\): bbox .* finite"),
        (change("annotations", 3, area="big"), r"area must be a number, found 'big'"),
        (change("annotations", 3, iscrowd=2), r"annotations\[3\] \(id 9\): iscrowd must be 0 or 1, found 2"),
        (change("annotations", 3, iscrowd="false"), r"iscrowd must be 0 or 1, found 'false'"),
        (change("annotations", 3, bbox=None, caption="A dog."), r"these are captions, boxes are in the instances"),
    ],
)
def test_bad_content_gets_one_clear_message(broken: Callable, message: str) -> None:
    what = content()
    replaced = broken(what)
    with pytest.raises(DataError, match=message) as caught:
        parse_annotations(what if replaced is None else replaced, "a")
    assert "\n" not in str(caught.value)


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    for text, message in (
        (b'{\n "images": [],\n "annotat": oops\n}', r"train\.json:3: not valid JSON: Expecting.*\(column 13\)"),
        (b'{\n "images": [{"id": 1,\n', r"train\.json:3: not valid JSON"),
        (b'{"images": "\xff\xfe\xfd"}', r"train\.json: not valid JSON: not text in UTF-8"),
        (b"[" * 100_000, r"train\.json: not JSON that can be read: .*recursion"),
        (b'{"images": [{"id": ' + b"1" * 5000 + b"}]}", r"train\.json: not JSON that can be read: .*digits"),
        (b"", r"train\.json:1: not valid JSON"),
        (codecs.BOM_UTF8, r"train\.json:1: not valid JSON"),
    ):
        file.write_bytes(text)
        with pytest.raises(DataError, match=message):
            read_annotations(file)
    with pytest.raises(DataError, match=r"nothing\.json: cannot be read: No such file"):
        read_annotations(tmp_path / "nothing.json")
