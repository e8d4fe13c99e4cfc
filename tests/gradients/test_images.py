"""Which images are looked at, and which boxes they are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from defeat_cli.data.annotations import read_annotations
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.errors import DataError
from defeat_cli.gradients.images import distinct_names, find_images, images_of


def test_input_that_leads_nowhere(tmp_path: Path, shapes: Path):
    with pytest.raises(DataError, match=r"missing\.jpg: no such image or folder"):
        find_images([str(tmp_path / "missing.jpg")])
    with pytest.raises(DataError, match="no images in this folder"):
        find_images([str(tmp_path)])
    with pytest.raises(DataError, match="no file matches this pattern"):
        find_images([str(tmp_path / "*.png")])
    Image.new("RGB", (8, 8)).save(tmp_path / "stranger.png")
    with pytest.raises(DataError, match=r"stranger\.png: .*val\.json has no ground truth for it"):
        find_images([str(tmp_path / "stranger.png")], read_annotations(shapes / "val.json"))


def test_files_folders_and_patterns_lead_to_each_image_once(shapes: Path):
    names = sorted(path.name for path in (shapes / "images").iterdir())
    folder = shapes / "images"
    found = find_images([str(folder / names[2]), str(folder), str(folder / "*")])
    assert [source.path.name for source in found] == [names[2], *(name for name in names if name != names[2])]
    assert len(find_images([str(folder)], limit=3)) == 3


def test_frames_of_a_folder_stand_in_the_order_of_their_numbers(tmp_path: Path):
    names = ["2.png", "frame_1.png", "frame_2.png", "frame_02.png", "frame_10.png", "frame_10b.png", "frame_a.png"]
    (tmp_path / "take_10").mkdir()
    for name in names:
        (tmp_path / "take_10" / name).touch()
    for given in (str(tmp_path / "take_10"), str(tmp_path / "*" / "*.png")):
        found = [source.path.name for source in find_images([given])]
        # 02 and 2 are one number; between them the letters decide.
        assert found == ["2.png", "frame_1.png", "frame_02.png", "frame_2.png", *names[4:]]


def test_annotations_choose_among_the_images_of_a_folder(shapes: Path):
    """The folder holds both splits; the file knows one of them, and a file named by itself must be in it."""
    known = read_annotations(shapes / "val.json")
    assert len(list((shapes / "images").iterdir())) > len(known.file_names)
    found = find_images([str(shapes / "images")], known)
    assert [source.path.name for source in found] == sorted(known.file_names)
    assert all(source.objects.origin == "ground truth" for source in found)
    with pytest.raises(DataError, match="no image of this name"):
        find_images([str(shapes / "images" / known.file_names[0])], read_annotations(shapes / "train.json"))


def test_a_file_name_is_matched_by_its_whole_path_before_its_last_part(tmp_path: Path):
    names = ["a/x.png", "b/x.png", "c/y.png"]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 2 + i, 2 + i]} for i in range(len(names))
        ],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    known = read_annotations(tmp_path / "all.json")
    for path in ("b/x.png", "moved/y.png", "moved/x.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    found = find_images([str(tmp_path / "b" / "x.png"), str(tmp_path / "moved")], known)
    # moved/x.png could be either of two, and is left out.
    boxes = [(source.path.parent.name, source.objects.boxes[0, 2].item()) for source in found]
    assert boxes == [("b", 3), ("moved", 4)]


def test_images_called_alike_get_files_of_their_own(tmp_path: Path):
    paths = [tmp_path / folder / name for folder, name in (("a", "x.png"), ("b", "x.png"), ("c", "x_2.png"))]
    for path in paths:
        path.parent.mkdir()
        Image.new("RGB", (8, 8)).save(path)
    assert distinct_names(find_images([str(path) for path in paths])) == ["x", "x_2", "x_2_2"]


def test_annotated_boxes_are_those_of_the_data_set(shapes: Path):
    dataset = DetectionDataset(read_annotations(shapes / "val.json"), shapes / "images", train=False)
    for source, sample in zip(images_of(dataset), dataset, strict=False):
        assert torch.equal(source.objects.boxes, sample.target["boxes"])
        assert [dataset.classes.index(name) + 1 for name in source.objects.classes] == sample.target["labels"].tolist()
        assert torch.equal(source.read(), sample.image)
