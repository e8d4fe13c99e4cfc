"""How anchors fit boxes, beside torchvision's own anchors and boxes made for known sizes."""

import json

import numpy as np
import pytest
import torch
from data.layouts import write_coco
from PIL import Image
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from defeat_cli.audit.anchors import Boxes, Level, anchor_shapes, best_overlaps, better_sizes, fit, pyramid
from defeat_cli.building import build_student
from defeat_cli.console import Reporter
from defeat_cli.jobs.choosing import choose_recipe
from defeat_cli.session import open_data
from defeat_cli.verifying import notes_on


def test_the_best_overlap_is_that_with_torchvisions_anchors():
    sizes, strides, ratios = ((24,), (48,), (90,)), (8, 16, 32), (0.5, 1.0, 2.0)
    generator = AnchorGenerator(sizes, (ratios,) * 3)
    maps = [torch.zeros(1, 1, 96 // stride, 160 // stride) for stride in strides]
    anchors = generator(ImageList(torch.zeros(1, 3, 96, 160), [(90, 150)]), maps)[0]
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 80, (200, 2))
    corners = np.hstack([low, low + rng.uniform(2, 70, (200, 2))]).clip(0, [150, 90, 150, 90])
    levels = [
        Level(stride, (cell[:, 2:] - cell[:, :2]).numpy())
        for stride, cell in zip(strides, generator.cell_anchors, strict=True)
    ]
    ours = best_overlaps(Boxes(corners, np.tile([150.0, 90.0], (200, 1))), levels)
    expected = box_iou(torch.from_numpy(corners), anchors.double()).amax(dim=1)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-9)


def test_shapes_have_the_area_of_their_size():
    shapes = anchor_shapes([8, 10], [0.5, 2.0])
    np.testing.assert_allclose(shapes.prod(axis=1), [64, 64, 100, 100])
    np.testing.assert_allclose(shapes[:, 1] / shapes[:, 0], [0.5, 2, 0.5, 2])


def test_sizes_that_the_boxes_were_made_with_are_found():
    """Five groups of boxes, each around a size of its own, with every ratio: the sizes come back, in order."""
    rng = np.random.default_rng(1)
    made = [6, 13, 30, 70, 150]
    sides = np.concatenate([anchor_shapes([size], [0.5, 1, 2]) for size in made for _ in range(20)])
    sides = sides * rng.uniform(0.95, 1.05, sides.shape)
    corners = np.hstack([np.full((len(sides), 2), 40.0), 40 + sides])
    boxes = Boxes(corners, np.full((len(sides), 2), 256.0))
    assert [size for (size,) in better_sizes(boxes, 5, 1, [0.5, 1, 2])] == pytest.approx(made, rel=0.05)
    levels = [Level(2, anchor_shapes([size], [0.5, 1, 2])) for size in (200, 220, 240, 250, 256)]
    found = fit(boxes, levels, [0.5, 1, 2])
    assert found.bad
    assert found.better > 0.8 > found.mean
    assert fit(boxes, [Level(2, anchor_shapes(made, [0.5, 1, 2]))], [0.5, 1, 2]).sizes is None


def test_sizes_are_offered_that_suit_the_strides_too():
    """Boxes of one cell of the finest level to three: sizes close to theirs would put most on levels that are too
    coarse to meet them, so what grows with the strides is offered."""
    sides = np.exp(np.random.default_rng(2).uniform(np.log(8), np.log(24), 200))
    centres = np.random.default_rng(3).uniform(40, 200, (200, 2))
    corners = np.hstack([centres - sides[:, None] / 2, centres + sides[:, None] / 2])
    boxes, strides = Boxes(corners, np.full((200, 2), 256.0)), [8, 16, 32, 64, 128]

    def overlap(sizes):
        levels = [Level(stride, anchor_shapes(own, [1])) for stride, own in zip(strides, sizes, strict=True)]
        return best_overlaps(boxes, levels).mean()

    found = fit(boxes, [Level(stride, anchor_shapes([8 * stride], [1])) for stride in strides], [1])
    assert found.better == pytest.approx(overlap(found.sizes))
    assert found.better > overlap(better_sizes(boxes, 5, 1, [1])) + 0.05
    finest = found.sizes[0][0]
    assert [size for (size,) in found.sizes] == pytest.approx([finest * 2**level for level in range(5)], rel=0.05)
    assert pyramid(12, strides, 3)[:2] == [[12, 15, 19], [24, 30, 38]]


def small_boxes(folder):
    """Images of 64 pixels with a box of 4.5 each."""
    for split, count in (("train", 8), ("val", 2)):
        for i in range(count):
            pixels = np.random.default_rng((len(split), i)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            (folder / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"images/{split}{i}.png")
        rows = [{"id": i, "file_name": f"{split}{i}.png", "width": 64, "height": 64} for i in range(count)]
        marks = [{"id": i, "image_id": i, "category_id": 1, "bbox": [6, 6, 4.5, 4.5]} for i in range(count)]
        write_coco(folder / f"{split}.json", images=rows, annotations=marks)
    return folder


@pytest.mark.parametrize("side", [32, 64, 96])
@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_a_chosen_recipe_is_not_warned_of(tmp_path, family, side):
    data = small_boxes(tmp_path / "set")
    said = {"data.path": str(data), "data.short_side": [side], "student.detector": family, "run.device": "cpu"}
    recipe = choose_recipe(said, Reporter("recipe", quiet=True))
    train, val = (open_data(recipe.data, split, train=split == "train") for split in ("train", "val"))
    notes = notes_on(train, val, recipe.data, build_student(recipe, train.classes))
    assert [text for text, warning in notes if warning] == []
    # Where no size does better, that is what there is to know.
    assert all("No other sizes do much better" in text for text, _ in notes if "anchor" in text)


def test_check_judges_data_alone_by_what_would_be_chosen(defeat, tmp_path):
    output = defeat("check", "-d", small_boxes(tmp_path / "set"), "--json", tmp_path / "found.json", code=0)
    assert "as `train` would have it on a CPU: anchors of faster_rcnn, images resized to 64: the best anchor" in output
    assert "1 class: " in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["anchors"]["resized_to"] == [64, 64]
    assert found["anchors"]["better_sizes"] is None
    assert found["splits"]["train"]["box_size"] == {"smallest": 4.5, "median": 4.5, "largest": 4.5}


def test_train_and_check_offer_sizes_that_do_better(defeat, tiny, tmp_path):
    """Boxes of 5x5 pixels in images of 64, anchors from 8 on: told by both, and the offer is as good as it says."""
    small_boxes(tmp_path / "set")
    sizes = "student.anchor_sizes=[[16],[24],[32],[64],[96]]"
    said = "warning: the student's anchors fit the boxes badly"
    outputs = [
        defeat("check", "-r", tiny, "-d", tmp_path / "set", "--set", sizes),
        defeat("train", "-r", tiny, "-d", tmp_path / "set", "--set", sizes, "--set", "schedule.epochs=1",
               "-o", tmp_path / "run"),
    ]  # fmt: skip
    lines = [next(line for line in output.splitlines() if line.startswith(said)) for output in outputs]
    assert lines[0] == lines[1]
    offer, promise = lines[0].split("--set ")[1].split(" has ")
    output = defeat("check", "-r", tiny, "-d", tmp_path / "set", "--set", offer, "--json", tmp_path / "found.json")
    assert said not in output
    assert json.loads((tmp_path / "found.json").read_text())["anchor_fit"] == pytest.approx(float(promise), abs=0.02)
