"""Masks against drawn grids and against slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import masks as oracle
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import box_iou

from defeat_cli.config.terms import NeckSettings
from defeat_cli.distillation import masks as masks_module
from defeat_cli.distillation.masks import (
    MASKS,
    backbone_masks,
    box_masks,
    fine_grained_masks,
    full_masks,
    gaussian_masks,
    valid_masks,
)

SHAPES = [(20, 26), (10, 13), (5, 7), (3, 4)]
STRIDES = [4, 8, 16, 32]
"""Levels of an 80 x 104 input; the last two maps are rounded up."""

EMPTY = torch.zeros(0, 4, dtype=torch.float64)

SPECIAL_BOXES = {
    "none": [],
    "smaller than a cell": [[5.1, 6.2, 5.9, 6.7], [30.5, 41.5, 31.0, 43.9]],
    "thin": [[10.0, 3.0, 11.0, 70.0], [3.0, 50.2, 100.0, 51.0]],
    "across a cell's edge by less than a cell": [[7.5, 7.5, 8.5, 8.5]],
    "touching the border": [[0.0, 0.0, 12.0, 9.0], [90.0, 60.0, 104.0, 80.0], [103.5, 79.5, 104.0, 80.0]],
    "the whole image": [[0.0, 0.0, 104.0, 80.0]],
    "larger than the image": [[-50.0, -20.0, 300.0, 200.0]],
    "partly outside": [[-10.0, -10.0, 2.0, 3.0], [95.0, 70.0, 130.0, 90.0], [-3.0, 10.0, 40.0, 30.0]],
    "outside": [[-20.0, -20.0, -5.0, -5.0], [200.0, 10.0, 220.0, 30.0], [10.0, 100.0, 40.0, 120.0]],
    "a point": [[33.0, 17.0, 33.0, 17.0]],
    "overlapping": [[10.0, 10.0, 40.0, 40.0], [20.0, 5.0, 60.0, 35.0], [25.0, 25.0, 35.0, 35.0]],
}


def random_boxes(count, seed):
    """Boxes of all sizes and shapes, some of them partly outside of 80 x 104 pixels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([110.0, 86.0])
    sides = torch.exp(torch.rand(count, 2, generator=generator, dtype=torch.float64) * 6 - 1)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


def grid_anchors(shapes, strides, dtype=torch.float64):
    """Three anchors a cell, around 4 strides wide: square, wide and tall."""
    levels = []
    for (h, w), stride in zip(shapes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing="ij")
        centre = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        halves = torch.tensor([[2.0, 2.0], [3.0, 1.5], [1.5, 3.0]]) * stride
        levels.append((centre + torch.cat([-halves, halves], dim=1)).reshape(-1, 4).to(dtype))
    return levels


def cases():
    named = [([torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)], name) for name, boxes in SPECIAL_BOXES.items()]
    everything = [torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) for boxes in SPECIAL_BOXES.values()]
    named.append((everything, "a batch of all of these"))
    named += [([random_boxes(12, seed), EMPTY, random_boxes(40, seed + 100)], f"random {seed}") for seed in range(3)]
    return [pytest.param(boxes, id=name) for boxes, name in named]


def as_lists(boxes):
    return [of_image.tolist() for of_image in boxes]


def assert_equal(masks, expected, dtype=torch.bool):
    assert len(masks) == len(expected)
    for mask, slow in zip(masks, expected, strict=True):
        slow = torch.tensor(slow, dtype=dtype)
        assert mask.dtype == dtype
        assert mask.shape == slow.shape
        torch.testing.assert_close(mask, slow, rtol=0, atol=0 if dtype == torch.bool else 1e-10)


def drawing(mask):
    return ["".join("#" if cell else "." for cell in row) for row in mask.tolist()]


class TestBoxMasks:
    def test_drawn(self):
        # Stride 4. The square covers 8/4 = 2 up to 20/4 = 5 in x and 1 up to 3 in y. The strip of 1 pixel covers
        # column floor(25/4) = 6, rows 2 up to 7. The point of 1 pixel covers one cell: column 1, row 6.
        boxes = torch.tensor([[8.0, 4.0, 20.0, 12.0], [25.0, 10.0, 26.0, 28.0], [5.0, 25.0, 6.0, 26.0]])
        (mask,) = box_masks([boxes], [(8, 8)], [4])
        assert drawing(mask[0]) == [
            "........",
            "..###...",
            "..###.#.",
            "......#.",
            "......#.",
            "......#.",
            ".#....#.",
            "........",
        ]

    @pytest.mark.parametrize("boxes", cases())
    def test_equals_loops(self, boxes):
        assert_equal(box_masks(boxes, SHAPES, STRIDES, 14.0), oracle.box_masks(as_lists(boxes), SHAPES, STRIDES, 14.0))

    @pytest.mark.parametrize("boxes", cases())
    def test_float32_equals_loops(self, boxes):
        boxes = [of_image.float() for of_image in boxes]
        assert_equal(box_masks(boxes, SHAPES, STRIDES), oracle.box_masks(as_lists(boxes), SHAPES, STRIDES))

    @pytest.mark.parametrize(
        ("side", "level"), [(1, 0), (111, 0), (112, 1), (223, 1), (224, 2), (447, 2), (448, 3), (896, 4), (1300, 4)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_box_is_on_the_level_of_its_size(self, side, level, dtype):
        # sqrt(side * side) / 56 is 2 at 112, 4 at 224, 8 at 448, 16 at 896; the last level takes what is larger.
        boxes = [torch.tensor([[0, 0, side, side]], dtype=dtype)]
        masks = box_masks(boxes, [(200, 334), (100, 167), (50, 84), (25, 42), (13, 21)], [4, 8, 16, 32, 64])
        assert [bool(mask.any()) for mask in masks] == [i == level for i in range(5)]

    @pytest.mark.parametrize(("side", "level"), [(111.9998, 0), (111.99997, 1)])
    def test_a_box_within_rounding_of_a_level_is_on_it(self, side, level):
        # 111.99997 / 56 = 1.99999946, and 1e-6 more is above 2; 111.9998 / 56 = 1.99999643 stays below.
        boxes = [torch.tensor([[0.0, 0.0, side, side]], dtype=torch.float64)]
        assert [bool(mask.any()) for mask in box_masks(boxes, [(28, 28), (14, 14)], [4, 8])].index(True) == level

    def test_finest_scale_moves_boxes_between_levels(self):
        boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0]])]
        coarse = box_masks(boxes, [(8, 8), (4, 4)], [4, 8], finest_scale=8.0)
        fine = box_masks(boxes, [(8, 8), (4, 4)], [4, 8], finest_scale=9.0)
        assert [int(mask.sum()) for mask in coarse] == [0, 4]
        assert [int(mask.sum()) for mask in fine] == [16, 0]

    def test_what_is_no_box_marks_nothing(self):
        right_of_left, nan = [30.0, 5.0, 10.0, 20.0], [math.nan] * 4
        box = [4.0, 4.0, 12.0, 12.0]
        (alone,) = box_masks([torch.tensor([box])], [(8, 8)], [4])
        (mask,) = box_masks([torch.tensor([right_of_left, box, nan])], [(8, 8)], [4])
        assert torch.equal(mask, alone)

    def test_half_precision_boxes_are_computed_in_full(self):
        boxes = torch.tensor([[1021.0, 5.0, 1027.0, 9.0]], dtype=torch.bfloat16)
        (expected,) = box_masks([boxes.float()], [(4, 260)], [4])
        (mask,) = box_masks([boxes], [(4, 260)], [4])
        assert torch.equal(mask, expected)

    def test_autocast_changes_nothing(self):
        boxes = [random_boxes(300, 7).float()]
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = box_masks(boxes, SHAPES, STRIDES)
        assert_equal(under_autocast, oracle.box_masks(as_lists(boxes), SHAPES, STRIDES))


class TestGaussianMasks:
    def test_by_hand(self):
        # One box of 32 x 16 pixels at stride 4: 8 x 4 cells. Cell centres lie 2, 6, 10, 14 from the middle of x, and
        # 2, 6 from the middle of y; halves are 16 and 8.
        (mask,) = gaussian_masks([torch.tensor([[0.0, 8.0, 32.0, 24.0]], dtype=torch.float64)], [(8, 8)], [4])
        across = [math.exp(-0.5 * (d / 16) ** 2) for d in (14, 10, 6, 2, 2, 6, 10, 14)]
        down = [0.0, 0.0] + [math.exp(-0.5 * (d / 8) ** 2) for d in (6, 2, 2, 6)] + [0.0, 0.0]
        expected = torch.tensor([[a * d for a in across] for d in down], dtype=torch.float64)
        torch.testing.assert_close(mask[0], expected, rtol=0, atol=1e-12)

    def test_drawn(self):
        # Tenths, rounded down: exp(-0.5 0.25^2) = 0.97 and exp(-0.5 0.75^2) = 0.75 a direction in the large box. The
        # small one is half a cell wide and its corner is the cell's centre: exp(-0.5) a direction, 0.36.
        boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0], [28.0, 28.0, 30.0, 30.0]])
        (mask,) = gaussian_masks([boxes], [(8, 8)], [4])
        rows = ["".join("." if v == 0 else str(int(v * 10)) for v in row) for row in mask[0].tolist()]
        assert rows == [
            "........",
            ".5775...",
            ".7997...",
            ".7997...",
            ".5775...",
            "........",
            "........",
            ".......3",
        ]

    @pytest.mark.parametrize("boxes", cases())
    def test_equals_loops(self, boxes):
        expected = oracle.gaussian_masks(as_lists(boxes), SHAPES, STRIDES, 14.0)
        assert_equal(gaussian_masks(boxes, SHAPES, STRIDES, 14.0), expected, torch.float64)

    @pytest.mark.parametrize("boxes", cases())
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_lies_in_the_cells_of_the_boxes(self, boxes, dtype):
        boxes = [of_image.to(dtype) for of_image in boxes]
        marked = box_masks(boxes, SHAPES, STRIDES)
        for mask, cells in zip(gaussian_masks(boxes, SHAPES, STRIDES), marked, strict=True):
            assert mask.dtype == dtype
            assert torch.equal(mask > 0, cells)
            assert bool((mask <= 1).all())
            assert bool((mask[cells] >= math.exp(-1) - 1e-6).all())

    def test_chunks_change_nothing(self, monkeypatch):
        boxes = [random_boxes(23, 1), EMPTY, random_boxes(9, 2)]
        whole = gaussian_masks(boxes, SHAPES, STRIDES, 14.0)
        monkeypatch.setattr(masks_module, "MAX_ELEMENTS", 5000)
        for mask, chunked in zip(whole, gaussian_masks(boxes, SHAPES, STRIDES, 14.0), strict=True):
            assert torch.equal(mask, chunked)


class TestFineGrainedMasks:
    def test_drawn(self):
        # One anchor a cell, 8 x 8 pixels with its corner at the cell's; the box is the anchor of cell (2, 2). Anchors
        # moved by d cells of 4 pixels along one axis overlap by half: IoU 1/3, along both by a quarter: 1/7. None but
        # the best exceeds 0.5 x 1; at 0.25 the four neighbours do too; at 0.1 the diagonal ones as well.
        y, x = torch.meshgrid(torch.arange(8) * 4.0, torch.arange(8) * 4.0, indexing="ij")
        anchors = torch.stack([x, y, x + 8, y + 8], dim=-1).reshape(-1, 4)
        boxes = [torch.tensor([[8.0, 8.0, 16.0, 16.0]])]
        rows = {
            ratio: drawing(fine_grained_masks(boxes, [(8, 8)], [anchors], ratio)[0][0])[1:4]
            for ratio in (0.5, 0.25, 0.1)
        }
        assert rows == {
            0.5: ["........", "..#.....", "........"],
            0.25: ["..#.....", ".###....", "..#....."],
            0.1: [".###....", ".###....", ".###...."],
        }

    def test_any_anchor_of_a_cell_counts(self):
        # The second of two anchors fits, in cell (0, 1) only.
        anchors = torch.tensor([[0, 0, 4, 4], [100, 100, 104, 104], [200, 200, 204, 204], [8, 0, 12, 4]]).double()
        (mask,) = fine_grained_masks([torch.tensor([[8.0, 0.0, 12.0, 4.0]]).double()], [(1, 2)], [anchors])
        assert mask.tolist() == [[[False, True]]]

    def test_the_best_anchor_of_all_levels_counts(self):
        # One anchor a level, of 8, 16 and 32 pixels around one centre. A box of 12 pixels has IoU 64/144 = 0.44,
        # 144/256 = 0.56 and 144/1024 = 0.14 with them: the first two exceed half of the best. The box of 32 has 1/16,
        # 1/4 and 1: the last alone does.
        anchors = [torch.tensor([[16.0 - half, 16.0 - half, 16.0 + half, 16.0 + half]]) for half in (4, 8, 16)]
        for half, levels in ((6, [True, True, False]), (16, [False, False, True])):
            boxes = [torch.tensor([[16.0 - half, 16.0 - half, 16.0 + half, 16.0 + half]])]
            assert [bool(mask) for mask in fine_grained_masks(boxes, [(1, 1)] * 3, anchors)] == levels

    def test_the_ratio_is_exceeded_strictly(self):
        # IoU with the box of 8 x 8 pixels: 1 for itself, exactly 1/2 for its half.
        anchors = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 4]]).double()
        (mask,) = fine_grained_masks([torch.tensor([[0.0, 0.0, 8.0, 8.0]]).double()], [(1, 2)], [anchors], 0.5)
        assert mask.tolist() == [[[True, False]]]

    @pytest.mark.parametrize("boxes", cases())
    @pytest.mark.parametrize("ratio", [0.5, 0.9])
    def test_equals_loops(self, boxes, ratio):
        shapes, strides = SHAPES[1:], STRIDES[1:]
        anchors = grid_anchors(shapes, strides)
        slow_anchors = [level.tolist() for level in anchors]
        expected = oracle.fine_grained_masks(as_lists(boxes), shapes, slow_anchors, ratio)
        assert_equal(fine_grained_masks(boxes, shapes, anchors, ratio), expected)

    def test_overlaps_round_as_torchvisions(self):
        boxes, others = random_boxes(30, 1).float(), random_boxes(200, 2).float()
        overlaps = masks_module._Overlaps(others, torch.float32)
        for some in (boxes[:20], boxes[20:], boxes[:20]):  # one after another, in memory that they share
            assert torch.equal(overlaps(some[None])[0], box_iou(some, others))

    @pytest.mark.parametrize("at_once", [1, 5000, 20000])  # a box, two and nine times the 2091 anchors
    def test_chunks_change_nothing(self, monkeypatch, at_once):
        boxes, anchors = [random_boxes(23, 1), EMPTY, random_boxes(9, 2)], grid_anchors(SHAPES, STRIDES)
        whole = fine_grained_masks(boxes, SHAPES, anchors)
        monkeypatch.setattr(masks_module, "IN_CACHE", at_once)
        for mask, chunked in zip(whole, fine_grained_masks(boxes, SHAPES, anchors), strict=True):
            assert torch.equal(mask, chunked)

    def test_float32_boxes(self):
        boxes = [random_boxes(10, 3).float()]
        masks = fine_grained_masks(boxes, SHAPES, grid_anchors(SHAPES, STRIDES, torch.float32))
        assert all(mask.dtype == torch.bool for mask in masks)
        assert any(bool(mask.any()) for mask in masks)


class TestBackboneMasks:
    def test_drawn(self):
        # At stride 4 the box covers columns 1 to 4 and rows 2 to 5; the point covers (7, 7). Every second cell is kept
        # at stride 8: columns 2 and 4, rows 2 and 4, and the point is lost.
        boxes = [torch.tensor([[4.0, 8.0, 20.0, 24.0], [29.0, 29.0, 30.0, 30.0]])]
        finest, coarser = backbone_masks(boxes, [(8, 8), (4, 4)], [4, 8])
        assert drawing(finest[0]) == [
            "........",
            "........",
            ".####...",
            ".####...",
            ".####...",
            ".####...",
            "........",
            ".......#",
        ]
        assert drawing(coarser[0]) == ["....", ".##.", ".##.", "...."]

    @pytest.mark.parametrize("boxes", cases())
    @pytest.mark.parametrize("first", [0, 1])
    def test_equals_loops(self, boxes, first):
        shapes, strides = [(24, 32), (12, 16), (6, 8), (3, 4)][first:], STRIDES[first:]
        assert_equal(backbone_masks(boxes, shapes, strides), oracle.backbone_masks(as_lists(boxes), shapes, strides))


class TestValidMasks:
    @staticmethod
    def pixels(sizes, height, width):
        valid = torch.zeros(len(sizes), height, width, dtype=torch.bool)
        for i, (h, w) in enumerate(sizes):
            valid[i, :h, :w] = True
        return valid

    def test_drawn(self):
        # An image of 17 x 24 pixels in 32 x 32: rows 0 to 4 begin at 0, 4, 8, 12, 16 < 17; columns 0 to 5 before 24.
        (mask,) = valid_masks(self.pixels([(17, 24)], 32, 32), [(8, 8)])
        assert drawing(mask[0]) == ["######.."] * 5 + ["........"] * 3

    @pytest.mark.parametrize("given", [False, True], ids=["strides implied", "strides given"])
    @pytest.mark.parametrize(("height", "width"), [(800, 1344), (96, 416), (32, 32), (160, 224)])
    def test_equals_loops(self, height, width, given):
        strides = [4, 8, 16, 32, 64, 128]
        shapes = [(-(-height // s), -(-width // s)) for s in strides]
        sizes = [(height, width - 31), (height - 31, width), (1, 1), (height // 2 + 1, width // 2)]
        masks = valid_masks(self.pixels(sizes, height, width), shapes, strides if given else None)
        assert_equal(masks, oracle.valid_masks(sizes, shapes, strides))

    def test_maps_rounded_down_need_their_strides(self):
        valid = self.pixels([(100, 90)], 100, 100)
        (mask,) = valid_masks(valid, [(12, 12)], [8])
        assert_equal([mask], oracle.valid_masks([(100, 90)], [(12, 12)], [8]))
        with pytest.raises(ValueError, match=r"12 x 12 cells.*give strides"):
            valid_masks(valid, [(12, 12)])


class TestAllKinds:
    ANCHORS = grid_anchors(SHAPES, STRIDES)

    @pytest.mark.parametrize("kind", MASKS)
    @pytest.mark.parametrize("boxes", [[EMPTY, EMPTY], [EMPTY, random_boxes(5, 0)]], ids=["no boxes", "some boxes"])
    def test_shapes_and_range(self, kind, boxes):
        masks = MASKS[kind](boxes, SHAPES, STRIDES, finest_scale=14.0, anchors=self.ANCHORS)
        assert [tuple(mask.shape) for mask in masks] == [(2, *shape) for shape in SHAPES]
        for mask in masks:
            assert not mask.requires_grad
            assert bool(((mask >= 0) & (mask <= 1)).all())
            assert bool((mask[0] == (kind == "full")).all())

    def test_kinds_are_those_of_the_recipe(self):
        for kind in MASKS:
            assert NeckSettings(mask=kind).mask == kind
        assert set(MASKS) == {"boxes", "gaussian", "fine-grained", "full"}

    def test_finest_scale_reaches_the_kinds_that_have_one(self):
        boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]], dtype=torch.float64)]
        for kind in ("boxes", "gaussian"):
            for scale, level in ((56.0, 0), (16.0, 1), (8.0, 2)):
                masks = MASKS[kind](boxes, SHAPES, STRIDES, finest_scale=scale, anchors=self.ANCHORS)
                assert [bool(mask.any()) for mask in masks] == [i == level for i in range(4)]

    def test_full(self):
        masks = full_masks([EMPTY, EMPTY], [(2, 3), (1, 2)])
        assert [mask.tolist() for mask in masks] == [[[[True] * 3] * 2] * 2, [[[True] * 2]] * 2]

    def test_nothing_waits_for_the_device(self):
        # Fake tensors have no values: reading one, as `.item()` or a boolean index does, raises.
        boxes = [random_boxes(5, 0), EMPTY, random_boxes(2, 1)]
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            boxes = [mode.from_tensor(of_image) for of_image in boxes]
            anchors = [mode.from_tensor(level) for level in self.ANCHORS]
            for kind in MASKS:
                MASKS[kind](boxes, SHAPES, STRIDES, finest_scale=56.0, anchors=anchors)
            backbone_masks(boxes, SHAPES, STRIDES)
            valid_masks(torch.ones(2, 80, 104, dtype=torch.bool), SHAPES)
