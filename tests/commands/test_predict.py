"""`defeat predict` through the real command: pictures, COCO, YOLO, crops, and images that cannot be read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO


@pytest.fixture
def folder(shapes, tmp_path):
    """Two images of different sizes, and one that is broken."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    first, second = sorted((shapes / "images").iterdir())[:2]
    Image.open(first).save(inputs / "a.png")
    Image.open(second).resize((90, 60)).save(inputs / "b.png")
    (inputs / "c.jpg").write_bytes(b"no image")
    return inputs


@pytest.fixture
def whole(folder):
    (folder / "c.jpg").unlink()
    return folder


def test_a_broken_image_is_named_and_the_others_are_done(defeat, teacher, folder, tmp_path):
    output = defeat("predict", teacher, folder, "-o", tmp_path / "out", code=2)
    assert "c.jpg: is not an image" in output
    assert "1 of 3 images could not be read" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "b.jpg"]


def test_every_file_tells_of_the_same_detections(defeat, teacher, whole, tmp_path):
    out = tmp_path / "out"
    defeat("predict", teacher, whole, "-o", out, "--save-coco", "--save-yolo", "--crop", "--threshold", 0.1)
    content = json.loads((out / "predictions.json").read_text())
    assert [(i["file_name"], i["width"], i["height"]) for i in content["images"]] == [
        ("a.png", 64, 64), ("b.png", 90, 60)
    ]  # fmt: skip
    assert content["annotations"]
    names = (out / "classes.txt").read_text().splitlines()
    assert names == [category["name"] for category in content["categories"]]
    coco = COCO(out / "predictions.json")
    crops = sorted((out / "crops").iterdir())
    assert len(crops) == len(content["annotations"])
    for image in content["images"]:
        stem = image["file_name"][0]
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        lines = (out / "labels" / f"{stem}.txt").read_text().splitlines()
        assert len(lines) == len(found)
        for number, (line, annotation) in enumerate(zip(lines, found, strict=True), start=1):
            assert annotation["score"] >= 0.1
            x, y, width, height = annotation["bbox"]
            label, *sides = line.split()
            assert int(label) == annotation["category_id"] - 1
            across, down = image["width"], image["height"]
            wanted = [(x + width / 2) / across, (y + height / 2) / down, width / across, height / down]
            assert [float(side) for side in sides] == pytest.approx(wanted, abs=1e-6)
            crop = np.array(Image.open(out / "crops" / f"{stem}_{number}_{names[int(label)]}.png"))
            pixels = np.array(Image.open(whole / image["file_name"]).convert("RGB"))
            left, top = int(x), int(y)
            assert np.array_equal(crop, pixels[top : top + crop.shape[0], left : left + crop.shape[1]])
            assert abs(crop.shape[1] - width) <= 2
            assert abs(crop.shape[0] - height) <= 2


def test_frames_are_told_of_in_the_order_of_their_numbers(defeat, teacher, shapes, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, image in zip((10, 2, 1), sorted((shapes / "images").iterdir()), strict=False):
        (frames / f"frame_{number}.png").write_bytes(image.read_bytes())
    (frames / "frame_3.png").write_bytes(b"no image")
    output = defeat("predict", teacher, frames, "-o", tmp_path / "out", "--save-coco", "--threshold", 0.1, code=2)
    assert "1 of 4 images could not be read" in output
    images = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["frame_1.png", "frame_2.png", "frame_10.png"]
    assert [image["id"] for image in images] == [1, 2, 3]


def test_predictions_are_those_of_eval(defeat, teacher, shapes, tmp_path):
    out = tmp_path / "out"
    defeat("eval", teacher, "-d", shapes, "--save-detections", tmp_path / "eval.json")
    content = json.loads((shapes / "val.json").read_text())
    images = [shapes / "images" / image["file_name"] for image in content["images"]]
    defeat("predict", teacher, *images, "-o", out, "--save-coco", "--threshold", 0)
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    predicted = json.loads((out / "predictions.json").read_text())
    own = {image["id"]: ids[image["file_name"]] for image in predicted["images"]}
    ours = [(own[a["image_id"]], a["category_id"], a["bbox"], a["score"]) for a in predicted["annotations"]]
    theirs = [tuple(d.values()) for d in json.loads((tmp_path / "eval.json").read_text())]
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], abs=1e-3)
        assert one[3] == pytest.approx(other[3], abs=1e-5)


def test_an_exported_file_beside_its_checkpoint(defeat, teacher, whole, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    exported = tmp_path / "t.onnx"
    defeat("export", teacher, exported)
    for checkpoint, out in ((exported, "onnx"), (teacher, "torch")):
        options = ["--side-by-side", teacher, "--save-coco", "--threshold", 0.1]
        defeat("predict", checkpoint, whole, "-o", tmp_path / out, *options)
        picture = Image.open(tmp_path / out / "b.jpg")
        assert picture.width > 2 * 480
    ours, theirs = (json.loads((tmp_path / out / "predictions.json").read_text()) for out in ("onnx", "torch"))
    assert len(ours["annotations"]) == len(theirs["annotations"]) > 0
    for one, other in zip(ours["annotations"], theirs["annotations"], strict=True):
        assert one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt", "{images}"], "nowhere.pt"),
        (["{teacher}", "nowhere"], "nowhere"),
        (["{teacher}", "{images}", "-o", "{images}"], "holds the images themselves"),
        (["{teacher}", "{images}", "-o", "full"], "add --overwrite"),
        (["{teacher}", "{images}", "-o", "full/file"], "is a file"),
        (["{teacher}", "{images}", "-o", "out", "-d", "{shapes}"], "names its classes itself"),
        (["{teacher}", "{images}", "-o", "out", "--side-by-side", "nowhere.pt"], "nowhere.pt"),
        (["nowhere.onnx", "{images}", "-o", "out"], "nowhere.onnx"),
        (["{teacher}", "{images}", "-o", "out", "--threshold", "2"], "--threshold"),
    ],
)
def test_bad_input_writes_nothing(defeat, teacher, shapes, whole, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    output = defeat("predict", *[a.format(teacher=teacher, images=whole, shapes=shapes) for a in arguments], code=2)
    assert message in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in"]
    assert len(list((tmp_path / "full").iterdir())) == 1


def test_what_a_bare_state_dict_does_not_say_is_told(defeat, teacher, whole, tmp_path):
    """Its own lowest score is 0.4, and its classes have no names."""
    defeat("convert", teacher, tmp_path / "t.pth", "--set", "student.score_threshold=0.4")
    torch.save(dict(torch.load(tmp_path / "t.pth", weights_only=True)), tmp_path / "t.pth")
    options = ["-r", tmp_path / "t.yaml", "-o", tmp_path / "out", "--threshold", "0.2"]
    output = defeat("predict", tmp_path / "t.pth", whole, *options)
    assert "gives nothing below score 0.4" in output
    assert "does not name its classes, which are numbered" in output


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_a_file_that_is_no_export_is_refused(defeat, whole, tmp_path, content):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "foreign.onnx"
    if content is None:  # a graph of somebody else's
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        node = onnx.helper.make_node("Relu", ["x"], ["y"])
        model = onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", [value], [out]),
            opset_imports=[onnx.helper.make_opsetid("", 17)],
            ir_version=8,
        )
        content = model.SerializeToString()
    path.write_bytes(content)
    output = defeat("predict", path, whole, "-o", tmp_path / "out", code=2)
    assert "foreign.onnx" in output
    assert not (tmp_path / "out").exists()
