"""YOLO's text files: as Ultralytics, Roboflow, CVAT and Label Studio give them."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.layouts import write_images, write_text, write_yolo

from defeat_cli.data.faults import RULES, Faults
from defeat_cli.data.opening import open_split
from defeat_cli.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_yolo(tmp_path, train=["a", "b"], val=["c"], test=["d"])
    return tmp_path


def relabel(folder: Path, line: str) -> None:
    write_text(folder / "labels/val/c.txt", f"0 0.5 0.5 0.1 0.1\n\n{line}\n")


def test_a_split_is_read_as_it_is(folder: Path) -> None:
    data = open_split(folder, "train", train=True)
    assert (data.layout, data.classes) == ("yolo", ["cat", "dog"])
    assert [data.file_name(i) for i in range(2)] == ["images/train/a.jpg", "images/train/b.jpg"]
    assert data[0].target["boxes"].tolist() == [[2, 1, 8, 5], [0, 0, 20, 10]]
    assert data[0].target["labels"].tolist() == [2, 1]
    assert data.annotations.category_ids == [0, 1]
    assert len(open_split(folder, "test", train=False)) == 1


def test_segments_are_read_as_boxes(folder: Path) -> None:
    relabel(folder, "1 0.1 0.2 0.4 0.2 0.4 0.6 0.2 0.7")
    assert open_split(folder, "val", train=False)[0].target["boxes"][1].tolist() == [2, 2, 8, 7]


def test_keypoints_follow_the_box(folder: Path) -> None:
    write_text(folder / "data.yaml", "val: images/val\nnames: {0: cat, 1: dog}\nkpt_shape: [2, 3]\n")
    relabel(folder, "1 0.25 0.3 0.3 0.4 0.1 0.1 2 0.9 0.9 1")
    assert open_split(folder, "val", train=False)[0].target["boxes"][1].tolist() == [2, 1, 8, 5]


@pytest.mark.parametrize(
    "config",
    [
        "val: images/val\nnames: [cat, dog]\n",
        "path: .\nval: ./images/val/\nnames: {1: dog, 0: cat}\n",
        "path: ../datasets/mine\nval: images/val\nnames:\n  '0': cat\n  '1': dog\n",  # as trained elsewhere
        "val: ../images/val\nnc: 2\nnames: ['cat', 'dog']\n",  # Roboflow's, which is not beside the folder either
        "val: /kaggle/working/images/val\nnames: [cat, dog]\n",
        "validation: [images/val]\nnames: [cat, dog]\n",
        "val: lists/val.txt\nnames: [cat, dog]\n",
        "names: [cat, dog]\nnc: 2\n",  # the folders are called like splits
    ],
)
def test_where_the_images_are(folder: Path, config: str) -> None:
    write_text(folder / "data.yaml", config)
    write_text(folder / "lists/val.txt", "../images/val/c.jpg\r\n\r\n", "utf-8-sig")
    write_images(folder / "lists", "images/val/never.jpg")
    write_text(folder / "lists/val.txt", f"{folder}/images/val/c.jpg\r\n\r\n", "utf-8-sig")
    data = open_split(folder, "val", train=False)
    assert (data.classes, data.file_name(0)) == (["cat", "dog"], "images/val/c.jpg")
    assert data[0].target["boxes"].tolist() == [[2, 1, 8, 5], [0, 0, 20, 10]]


def test_images_without_labels_are_background_and_that_is_said(folder: Path) -> None:
    (folder / "labels/train/b.txt").unlink()
    data = open_split(folder, "train", train=True)
    assert data[1].target["boxes"].shape == (0, 4)
    assert any("1 of 2 images has no label file" in note for note in data.notes)
    (folder / "labels/train/a.txt").unlink()
    with pytest.raises(DataError, match=r"none of the 2 train images has a label file; for .*labels/train/a\.txt and"):
        open_split(folder, "train", train=True)


def test_a_list_of_names_in_place_of_data_yaml(tmp_path: Path) -> None:
    # Label Studio: classes.txt, images, labels, undivided. CVAT: obj.names, and labels beside the images.
    write_text(tmp_path / "studio/classes.txt", "cat\ndog\n")
    write_text(tmp_path / "cvat/obj.names", "cat\ndog")
    for i in range(5):
        write_images(tmp_path / "studio/images", f"{i}.jpg")
        write_text(tmp_path / "studio/labels" / f"{i}.txt", "1 0.25 0.3 0.3 0.4")
        write_images(tmp_path / "cvat/obj_train_data", f"{i}.jpg")
        write_text(tmp_path / "cvat/obj_train_data" / f"{i}.txt", "1 0.25 0.3 0.3 0.4")
    train = open_split(tmp_path / "studio", "train", train=True, val_fraction=0.4)
    assert (len(train), train[0].target["boxes"].tolist()) == (3, [[2, 1, 8, 5]])
    with pytest.raises(DataError, match=r"its images are not divided into train and val; set a part"):
        open_split(tmp_path / "studio", "val", train=False)
    assert len(open_split(tmp_path / "cvat", "train", train=True)) == 5
    with pytest.raises(DataError, match=r"no val images: there are none in a folder called val or valid or validation"):
        open_split(tmp_path / "cvat", "val", train=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "1 0.5 0.5 0.1",
            r"c\.txt:3: must be class x y w h, or class and the points x y of a polygon; found '1 0\.5 0",
        ),
        ("1", r"c\.txt:3: must be class x y w h"),
        ("dog 0.5 0.5 0.1 0.1", r"c\.txt:3: must be numbers, class x y w h; found 'dog"),
        ("2 0.5 0.5 0.1 0.1", r"c\.txt:3: class 2 is not known; data\.yaml has 2 classes, counted from 0"),
        ("-1 0.5 0.5 0.1 0.1", r"c\.txt:3: class -1 is not known"),
        ("0.5 0.5 0.5 0.1 0.1", r"c\.txt:3: class 0\.5 is not known"),
        ("nan 0.5 0.5 0.1 0.1", r"c\.txt:3: class nan is not known"),
        ("1 0.5 0.5 0.1 0.1 0.9", r"c\.txt:3: has 6 numbers: with a score behind each box these are detections"),
        ("1 10 5 6 4", r"c\.txt:3: x y w h must be shares of the image within 0\.\.1, found '1 10 5 6 4'"),
        ("1 0.5 0.5 nan 0.1", r"c\.txt:3: x y w h must be shares"),
        ("1 -0.5 0.5 0.1 0.1", r"c\.txt:3: x y w h must be shares"),
        ("1 0,5 0,5 0,1 0,1", r"c\.txt:3: must be numbers"),
    ],
)
def test_bad_lines_are_named_with_their_file(folder: Path, line: str, message: str) -> None:
    relabel(folder, line)
    with pytest.raises(DataError, match=message) as caught:
        open_split(folder, "val", train=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("names: [cat, dog]\nnc: 3\nval: images/val", r"data\.yaml: nc is 3, but names has 2 classes"),
        ("names: cat\nval: images/val", r"data\.yaml: names must be a list of class names, .*found 'cat'"),
        ("names: [cat, cat]\nval: images/val", r"names: 'cat' is there more than once"),
        ("names: [cat, [dog]]\nval: images/val", r"names: class 1 must have a name, found \['dog'\]"),
        ("names: {a: cat}\nval: images/val", r"names: 'a' is no class id"),
        ("names: [cat, dog]\nval: images/gone", r"data\.yaml: val: 'images/gone' is not there; looked for"),
        ("names: [cat, dog]\nval: 3", r"data\.yaml: val must be a folder or a list of them, found 3"),
        ("names: [cat, dog]\nval: data.yaml", r"data\.yaml: neither a folder of images nor a \.txt list"),
        ("names: [cat, dog]\ntrain: images/train", None),
        ("nc: 2\nval: images/val", r"data\.yaml: names is missing"),
        ("- a\n- b", r"data\.yaml: must be a mapping with names, train and val; found a list"),
        ("names: [cat\nval: x", r"data\.yaml:2: not valid YAML"),
        ("names: {[1]: 2}", r"data\.yaml:1: not valid YAML"),
    ],
)
def test_bad_data_yaml_is_named(folder: Path, config: str, message: str | None) -> None:
    write_text(folder / "data.yaml", config)
    if message is None:  # the folder is called like the split that data.yaml leaves out
        assert len(open_split(folder, "val", train=False)) == 1
    else:
        with pytest.raises(DataError, match=message):
            open_split(folder, "val", train=False)


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.yaml: no such file; .* holds data\.yaml, images, labels"):
        open_split(folder, "val", "yolo", annotations="gone.yaml", train=False)
    write_text(folder / "list.txt", "images/val/c.jpg\nimages/val/c.jpg\n")
    data = open_split(folder, "val", images="list.txt", train=False)
    assert any("1 image is listed twice, and read once" in note for note in data.notes)
    write_text(folder / "list.txt", "images/val/c.jpg\nimages/val/gone.jpg\n")
    with pytest.raises(DataError, match=r"list\.txt:2: 'images/val/gone\.jpg' is not there"):
        open_split(folder, "val", images="list.txt", train=False)
    write_images(folder / "images/val", "c.jpg")
    (folder / "images/val/c.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"c\.jpg: is not an image that can be read"):
        open_split(folder, "val", train=False)


def test_a_label_file_whose_image_is_gone_is_told(folder: Path) -> None:
    """Training goes on without it, and says so; a file of names is none."""
    write_text(folder / "labels/train/classes.txt", "cat\ndog\n")
    assert not open_split(folder, "train", train=True).annotations.notes
    (folder / "images/train/b.jpg").unlink()
    faults = Faults()
    data = open_split(folder, "train", train=True, faults=faults)
    assert [data.file_name(i) for i in range(len(data))] == ["images/train/a.jpg"]
    (note,) = data.annotations.notes
    assert note == f"label files without an image, which are not used: {folder / 'labels/train/b.txt'}"
    listing = Faults(RULES)
    open_split(folder, "train", train=True, faults=listing)
    assert listing.counts == {"label alone": 1}
    assert str(folder / "labels/train/b.txt") in listing.found[0].text
