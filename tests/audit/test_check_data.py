"""`defeat check --data`: every fault of a data set is listed, in every layout, with the exit code that says so."""

import json
import math
import shutil

import numpy as np
import pytest
from data.layouts import DOG, page, thing, write_coco, write_images, write_text, write_voc, write_yolo
from PIL import Image

from defeat_cli.data.faults import IMAGE_RULES, RULES


@pytest.fixture
def look(defeat, tmp_path):
    """Runs `check --data` on a folder; gives what it printed and what it wrote as JSON."""

    def run(folder, *options, code):
        output = defeat("check", "--data", folder, "--json", tmp_path / "found.json", *options, code=code)
        return output, json.loads((tmp_path / "found.json").read_text())

    return run


def counted(found):
    return {(problem["rule"], problem["split"]): problem["count"] for problem in found["problems"]}


def noise(path, seed, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def spoiled(folder):
    """A COCO data set of noise, 20x10 each, that breaks every rule for which one place is enough."""
    images = folder / "images"
    for i in range(10):
        noise(images / f"{i}.png", i)
    noise(folder.parent / "outside.png", 99)
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    cut_short(images / "3.png")
    (images / "4.png").write_text("no image")
    rows = [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in range(7)]
    rows[5]["width"] = 19
    rows += [
        {"id": 7, "file_name": "../../outside.png", "width": 20, "height": 10},
        {"id": 6, "file_name": "9.png", "width": 20, "height": 10},
        {"id": 10, "file_name": "./0.png", "width": 20, "height": 10},
        {"id": 11, "file_name": 5},
    ]
    boxes = [
        [2, 1, 6, 4], [2, 1, 6, 4], [15, 5, 20, 2], [1, 1, -3, 4], [1, 1, 0, 5], [1, 1, math.nan, 4], [1, 2, 3],
        [1, 2, 8, 4], [1, 2, 9, 4],
    ]  # fmt: skip
    marks = [{"id": i, "image_id": 0, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    marks[3]["id"] = 2
    marks += [{**marks[0], "id": 20, "category_id": 9}, {**marks[0], "id": 21, "image_id": 77}]
    marks += [{**marks[0], "id": 22, "category_id": 2}, {**marks[0], "id": 23, "image_id": 5}]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "cow"}]
    write_coco(folder / "train.json", images=rows, annotations=marks, categories=categories)
    shutil.copy(images / "0.png", images / "copy.png")
    shutil.copy(images / "6.png", images / "twice.png")
    shutil.copy(images / "6.png", images / "thrice.png")
    names = ["8.png", "copy.png", "twice.png", "thrice.png"]
    write_coco(folder / "val.json", *names, categories=categories)
    return folder


def test_every_fault_is_listed(look, tmp_path):
    output, found = look(spoiled(tmp_path / "set"), "--sheet", tmp_path / "sheet.png", code=1)
    assert counted(found) == {
        **{(rule, "train"): 1 for rule in IMAGE_RULES},
        ("climbs", "train"): 1,
        ("listed twice", "train"): 1,
        ("entry", "train"): 1,
        ("numbers", "train"): 2,
        ("unknown image", "train"): 1,
        ("unknown category", "train"): 1,
        ("duplicate id", "train"): 1,
        ("negative", "train"): 1,
        ("no area", "train"): 1,
        ("outside", "train"): 1,
        ("duplicate box", "train"): 1,
        ("duplicate annotation id", "train"): 1,
        ("same image", "val"): 1,
        ("in both", "train and val"): 3,  # 0.png and 6.png, the latter twice
        ("one split", "train and val"): 1,
    }
    assert not found["clean"]
    assert found["splits"]["train"]["images"] == 2  # 0.png and 6.png
    assert found["splits"]["train"]["classes"] == {"dog": 7, "cat": 1, "cow": 0}
    stops = {problem["rule"] for problem in found["problems"] if problem["stops_training"]}
    assert stops == {rule for rule, _ in counted(found) if RULES[rule].refused}
    (where,) = [p["examples"] for p in found["problems"] if p["rule"] == "duplicate annotation id"]
    assert where == [f"{tmp_path}/set/train.json: annotations[3] (id 2): an earlier annotation has this id too"]
    for said in (
        "images that are cut short: 1 in train (stops a training)",
        "annotations[5] (id 5): bbox must be four",
    ):
        assert said in output
    assert "problems found: 23" in output
    # 5 images, 4 of one with bad boxes, 1 repeated, 3 in both: in rows of four.
    assert Image.open(tmp_path / "sheet.png").size == (4 * 248 + 8, 4 * 278 + 8)


def test_what_train_stops_at_is_what_check_says(defeat, tiny, tmp_path):
    """Each fault alone: training refuses exactly those that `check` says it does, with the same words."""
    folder = tmp_path / "set"
    for i in range(6):
        noise(folder / f"images/{i}.png", i)
    write_coco(folder / "val.json", "4.png", "5.png")
    mark = {"image_id": 1, "category_id": 1, "bbox": [2, 1, 6, 4]}
    row = {"id": 9, "file_name": "3.png", "width": 20, "height": 10}
    changes = {
        "images": [{**row, "file_name": "../../../x.png"}, {**row, "width": 30}, {**row, "id": 1}, {**row, "id": 1.5}],
        "annotations": [{**mark, "bbox": [1, math.inf, 2, 2]}, {**mark, "image_id": 99}, {**mark, "category_id": 99},
                        {**mark, "bbox": [1, 1, -2, 3]}, {**mark, "bbox": [15, 5, 90, 9]}, mark],
    }  # fmt: skip
    for key, rows in changes.items():
        for extra in rows:
            write_coco(folder / "train.json", "0.png", "1.png", "2.png")
            content = json.loads((folder / "train.json").read_text())
            content[key].append(extra)
            write_text(folder / "train.json", json.dumps(content))
            defeat("check", "--data", folder, "--json", tmp_path / "found.json", code=1)
            problems = json.loads((tmp_path / "found.json").read_text())["problems"]
            assert problems, extra
            fatal = [problem for problem in problems if problem["stops_training"]]
            output = defeat("check", "-r", tiny, "-d", folder, code=2 if fatal else 0)
            assert not fatal or fatal[0]["examples"][0] in output


def test_a_clean_data_set(look, shapes, tmp_path):
    output, found = look(shapes, "--sheet", tmp_path / "sheet.png", code=0)
    assert found["clean"]
    assert found["problems"] == []
    assert "no problems found" in output
    assert not (tmp_path / "sheet.png").exists()
    val = json.loads((shapes / "val.json").read_text())
    counts = {category["name"]: 0 for category in val["categories"]}
    for annotation in val["annotations"]:
        counts[val["categories"][annotation["category_id"] - 1]["name"]] += 1
    assert found["splits"]["val"]["classes"] == counts
    assert found["splits"]["val"]["image_sizes"] == {"64x64": 6}
    # The images keep their 64 pixels, which a recipe that is chosen for them has.
    sides = sorted(math.sqrt(a["bbox"][2] * a["bbox"][3]) for a in val["annotations"])
    assert found["splits"]["val"]["box_size"]["smallest"] == pytest.approx(sides[0], abs=0.06)
    assert found["splits"]["val"]["box_size"]["largest"] == pytest.approx(sides[-1], abs=0.06)


def test_other_layouts(look, tmp_path):
    voc = tmp_path / "voc"
    write_voc(voc, train=["a", "b", "c"], val=["d"])
    bad = page("b.jpg", thing("dog", (0, "nan", 3, 3)), thing("", (1, 1, 3, 3)), DOG)
    write_text(voc / "Annotations/b.xml", bad)
    write_text(voc / "Annotations/c.xml", "<annotation")
    write_text(voc / "ImageSets/Main/train.txt", "a\nb\nc\ngone\n")
    assert counted(look(voc, code=1)[1]) == {
        ("numbers", "train"): 1, ("entry", "train"): 3, ("entry", "val"): 2, ("numbers", "val"): 1,
        ("same image", "train"): 1, ("in both", "train and val"): 1,
    }  # fmt: skip
    yolo = tmp_path / "yolo"
    write_yolo(yolo, train=["a", "b"], val=["c"])
    for i, name in enumerate(("train/a", "train/b", "val/c")):
        noise(yolo / "images" / f"{name}.jpg", i)
    write_text(yolo / "labels/train/b.txt", "1 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n1 5 5 2 2\n1 nan 0 0 0\n1 2\n")
    (yolo / "images/train/d.jpg").write_bytes(b"")
    assert counted(look(yolo, code=1)[1]) == {
        ("empty", "train"): 1, ("unknown category", "train"): 1, ("units", "train"): 1, ("numbers", "train"): 1,
        ("entry", "train"): 1,
    }  # fmt: skip


def test_names_in_lists_do_not_climb_out_of_a_yolo_folder(defeat, look, tmp_path):
    yolo = tmp_path / "set/yolo"
    write_yolo(yolo, train=["a"], val=["c"])
    write_images(tmp_path, "x.jpg")
    write_text(tmp_path / "x.txt", "1 0.5 0.5 0.1 0.1\n")
    write_text(yolo / "train.txt", f"images/train/a.jpg\n{tmp_path / 'x.jpg'}\n")
    write_text(yolo / "data.yaml", "train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    assert ("climbs", "train") in counted(look(yolo, code=1)[1])


def test_what_is_not_divided_is_gone_through_whole(look, tmp_path):
    for i in range(4):
        noise(tmp_path / f"set/images/{i}.png", i)
    write_coco(tmp_path / "set/all.json", *(f"{i}.png" for i in range(4)))
    output, found = look(tmp_path / "set", code=0)
    assert list(found["splits"]) == ["all"]
    assert "not divided into train and val" in output
    _, found = look(tmp_path / "set", "--set", "data.val_fraction=0.25", code=0)
    assert {name: split["images"] for name, split in found["splits"].items()} == {"train": 3, "val": 1}


def test_what_cannot_be_read_and_options_of_a_run(defeat, shapes, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "broken/train.json", '{"images": [')
    write_text(tmp_path / "broken/val.json", '{"images": [')
    for arguments, said in (
        (["--data", tmp_path / "empty"], "layout that is not known"),
        (["--data", tmp_path / "broken"], "train.json:1: not valid JSON"),
        (["--data", tmp_path / "gone"], "no such folder"),
        (["--data", shapes, "--variant", "neck"], "--variant: about a run"),
        (["--data", shapes, "--set", "optimizer.lr=1"], "optimizer.lr: without effect in `defeat check --data`"),
        (["--data", shapes, "--set", "data.on_bad_image=skip"], "data.on_bad_image: without effect"),
        (["-r", tiny, "--sheet", "x.png"], "--sheet"),
    ):
        assert said in defeat("check", *arguments, code=2)


def test_it_fits_into_80_columns(defeat, tmp_path, monkeypatch):
    from defeat_cli.console import console

    monkeypatch.setattr(console, "width", 80)
    output = defeat("check", "--data", spoiled(tmp_path / "set"), code=1)
    assert max(map(len, output.splitlines())) <= 80


def test_a_box_is_drawn_on_the_image_as_it_was_annotated(look, tmp_path):
    """The file asks to be turned, and its annotations are of the size that is stored: left is black, right is blue."""
    (tmp_path / "set/images").mkdir(parents=True)
    image, exif = Image.new("RGB", (20, 10)), Image.Exif()
    image.paste((0, 0, 255), (10, 0, 20, 10))
    exif[0x0112] = 6
    image.save(tmp_path / "set/images/a.png", exif=exif)
    boxes = [{"id": i, "image_id": 1, "category_id": 1, "bbox": [2, 2, 4, 4], "area": 16, "iscrowd": 0} for i in (1, 2)]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": boxes,
    }
    (tmp_path / "set/train.json").write_text(json.dumps(content))
    look(tmp_path / "set", "--sheet", tmp_path / "sheet.png", code=1)
    sheet = Image.open(tmp_path / "sheet.png")
    # 20 pixels are 237 wide on a tile, which begins at (8, 8).
    assert (sheet.getpixel((8 + 90, 8 + 100)), sheet.getpixel((8 + 200, 8 + 60))) == ((0, 0, 0), (0, 0, 255))
