"""What other libraries compute differently, each on a case small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align

from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.detectors.conventions import (
    LEVEL_OF_SIDE,
    ConventionAnchors,
    ConventionRetinaNet,
    ConventionRoIAlign,
    ConventionRoIHeads,
    Suppression,
    SymmetricBoxCoder,
)
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import RecipeError

TINY = {"backbone": "regnet", "widths": [8, 16, 24, 32], "fpn_channels": 32, "head_channels": 64, "norm": "batch"}
MMDETECTION = {
    "roi_align_aligned": True,
    "roi_align_sampling_ratio": 0,
    "rounded_anchors": False,
    "nominal_strides": True,
    "p6_from": "c5",
    "p7_relu": False,
    "edge_cases": "mmdetection",
}
DETECTRON2 = {
    **MMDETECTION,
    "stride_in_1x1": True,
    "anchor_order": "sizes-first",
    "p7_relu": True,
    "clip_after_nms": True,
    "edge_cases": "detectron2",
}


def model_of(detector: str, **keys) -> nn.Module:
    torch.manual_seed(0)
    return build_detector(Architecture(detector=detector, **{**TINY, **keys}), ["a", "b"], [96], 160).model.eval()


def anchors_of(sizes: list[list[float]], ratios: list[float], maps: list[tuple[int, int]], **keys) -> list[Tensor]:
    keys = {"rounded": False, "sizes_first": False, "nominal_strides": True, **keys}
    generator = ConventionAnchors(sizes, ratios, **keys)
    images = ImageList(torch.zeros(2, 3, 96, 96), [(96, 96), (90, 80)])
    return generator(images, [torch.zeros(2, 1, *shape) for shape in maps])


def test_anchors_are_not_rounded():
    (anchors, same) = anchors_of([[32.0]], [0.5], [(1, 1)])
    # A box of area 32 x 32 that is half as high as wide: sqrt(2) * 32 by sqrt(1/2) * 32 around the origin.
    wide, high = 32 * math.sqrt(2) / 2, 32 / math.sqrt(2) / 2
    torch.testing.assert_close(anchors, torch.tensor([[-wide, -high, wide, high]]))
    assert torch.equal(anchors, same)
    (rounded, _) = anchors_of([[32.0]], [0.5], [(1, 1)], rounded=True)
    assert rounded.tolist() == [[-23.0, -11.0, 23.0, 11.0]]


@pytest.mark.parametrize(
    ("sizes_first", "widths"),
    [(False, [16.0, 32.0, 8.0, 16.0]), (True, [16.0, 8.0, 32.0, 16.0])],
)
def test_order_of_the_anchors_of_one_cell(sizes_first, widths):
    """Sides 8 and 16, heights 1/4 and once the width: widths 16 and 8 of the small side, 32 and 16 of the large one."""
    (anchors, _) = anchors_of([[8.0, 16.0]], [0.25, 1.0], [(1, 1)], sizes_first=sizes_first)
    assert (anchors[:, 2] - anchors[:, 0]).tolist() == widths


@pytest.mark.parametrize(("nominal", "step"), [(True, 64.0), (False, 48.0)])
def test_anchors_step_by_the_nominal_stride(nominal, step):
    """An image of 96 has a map of 2 at stride 64, where torchvision steps by 96 // 2."""
    (anchors, _) = anchors_of([[8.0]] * 4, [1.0], [(12, 12), (6, 6), (3, 3), (2, 2)], nominal_strides=nominal)
    assert anchors[-4:, 0].tolist() == [-4.0, step - 4, -4.0, step - 4]
    assert anchors[-4:, 1].tolist() == [-4.0, -4.0, step - 4, step - 4]
    assert anchors[1].tolist() == [4.0, -4.0, 12.0, 4.0]


def test_stock_conventions_give_torchvisions_anchors():
    features = [torch.zeros(1, 1, side, side) for side in (24, 12, 6, 3, 2)]
    images = ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)])
    stock = model_of("faster_rcnn").rpn.anchor_generator
    sizes, ratios = [list(level) for level in stock.sizes], list(stock.aspect_ratios[0])
    ours = ConventionAnchors(sizes, ratios, rounded=True, sizes_first=False, nominal_strides=False)
    assert torch.equal(stock(images, features)[0], ours(images, features)[0])


def ramps() -> dict[str, Tensor]:
    """Maps whose value is the column, on levels of strides 4 to 32."""
    return {str(i): torch.arange(64.0 / 2**i).expand(1, 1, 64 // 2**i, -1) for i in range(4)}


@pytest.mark.parametrize(("aligned", "first"), [(True, 2.0), (False, 2.5)])
def test_aligned_pooling_shifts_by_half_a_cell(aligned, first):
    """Columns 8 to 36 are cells 2 to 9 at stride 4, in 7 bins of one cell. A cell's value is that of its middle, so
    the first bin, cell 2 to 3, has value 2; without the shift its middle is taken for column 2.5."""
    pool = ConventionRoIAlign(7, 2, aligned=aligned, levels="torchvision")
    pooled = pool(ramps(), [torch.tensor([[8.0, 8.0, 36.0, 36.0]])], [(256, 256)])
    torch.testing.assert_close(pooled[0, 0, 0], first + torch.arange(7.0))


def test_pooling_takes_each_box_from_its_level():
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.rand(2, 3, *ramp.shape[-2:], generator=generator) for name, ramp in ramps().items()}
    corners = torch.rand(40, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 4 + torch.rand(40, 2, generator=generator) ** 3 * 190], dim=1).split(20)
    ours = ConventionRoIAlign(7, 2, aligned=False, levels="torchvision")
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    assert torch.equal(ours(features, boxes, [(256, 256)] * 2), theirs(features, boxes, [(256, 256)] * 2))

    aligned = ConventionRoIAlign(7, 0, aligned=True, levels="mmdetection")(features, boxes, [(256, 256)] * 2)
    side = (boxes[0][0, 2:] - boxes[0][0, :2]).prod().sqrt()
    level = min(max(math.floor(math.log2(float(side) / 56)), 0), 3)
    expected = roi_align(features[str(level)][:1], [boxes[0][:1]], 7, 1 / 4 / 2**level, 0, aligned=True)
    torch.testing.assert_close(aligned[:1], expected)


def test_regions_between_two_levels():
    """A side of 112 belongs to P3, index 1, and 224 to P4. Below it each library is generous by its own epsilon:
    torchvision by 7e-7 of the side, mmdetection by 5e-7 at 112 and 2.5e-7 at 224, detectron2 not at all in float32."""
    sides = torch.tensor([112.0, 111.99996, 223.9999, 56.0, 55.0])
    assert LEVEL_OF_SIDE["torchvision"](sides).tolist() == [1, 1, 2, 0, -1]
    assert LEVEL_OF_SIDE["mmdetection"](sides).tolist() == [1, 1, 1, 0, -1]
    assert LEVEL_OF_SIDE["detectron2"](sides).tolist() == [1, 0, 1, 0, -1]


@pytest.mark.parametrize("source", ["c5", "p5"])
@pytest.mark.parametrize("relu", [True, False])
def test_p6_and_p7(source, relu):
    """C5 of 32 channels and an FPN as wide: torchvision alone could not tell them apart."""
    model = model_of("retinanet", conventions={"p6_from": source, "p7_relu": relu})
    stages = [torch.randn(1, channels, side, side) for channels, side in ((16, 8), (24, 4), (32, 2))]
    fpn = model.backbone.fpn
    levels = list(fpn({str(i): stage for i, stage in enumerate(stages)}).values())
    extra = fpn.extra_blocks
    p6 = extra.p6(stages[-1] if source == "c5" else levels[2])
    p7 = extra.p7(p6.relu() if relu else p6)
    assert torch.equal(levels[3], p6)
    assert torch.equal(levels[4], p7)
    assert bool((p6 < 0).any())


def test_stride_in_the_first_convolution_of_a_bottleneck():
    keys = {"backbone": "resnet50", "widths": None, "norm": "frozen"}
    body = model_of("faster_rcnn", **keys, conventions={"stride_in_1x1": True}).backbone.body
    stock = model_of("faster_rcnn", **keys).backbone.body
    for stage in ("layer2", "layer3", "layer4"):
        assert (body[stage][0].conv1.stride, body[stage][0].conv2.stride) == ((2, 2), (1, 1))
        assert (stock[stage][0].conv1.stride, stock[stage][0].conv2.stride) == ((1, 1), (2, 2))
    assert body["layer1"][0].conv1.stride == body["layer2"][1].conv1.stride == (1, 1)
    pixels = torch.rand(1, 3, 64, 64)
    assert [s.shape for s in body(pixels).values()] == [s.shape for s in stock(pixels).values()]


def test_boxes_shrink_no_further_than_they_may_grow():
    coder = SymmetricBoxCoder((1.0, 1.0, 5.0, 5.0))
    deltas = torch.tensor([[0.0, 0.0, -100.0, 100.0], [0.1, 0.2, -0.5, 0.5]])
    box = torch.tensor([[0.0, 0.0, 1000.0, 16.0], [0.0, 0.0, 10.0, 10.0]])
    (extreme, usual) = coder.decode_single(deltas, box)
    torch.testing.assert_close(extreme, torch.tensor([500.0 - 8, 8.0 - 500, 500.0 + 8, 8.0 + 500]))
    width, height = 10 * math.exp(-0.1), 10 * math.exp(0.1)
    torch.testing.assert_close(usual, torch.tensor([6 - width / 2, 7 - height / 2, 6 + width / 2, 7 + height / 2]))


@pytest.mark.parametrize(
    ("library", "empty_kept", "count"), [("torchvision", 0, 2), ("mmdetection", 1, 2), ("detectron2", 0, 1)]
)
def test_detections_clipped_to_nothing(library, empty_kept, count):
    """The surest of three boxes lies right of the image. At most two detections are wanted: torchvision gives the
    other two, mmdetection the empty one and the next, detectron2 only the next."""
    heads = model_of("faster_rcnn", detections_per_image=2, conventions={"edge_cases": library}).roi_heads
    proposals = [torch.tensor([[60.0, 0.0, 80.0, 20.0], [0.0, 0.0, 20.0, 20.0], [0.0, 25.0, 20.0, 45.0]])]
    scores = torch.tensor([[0.05, 0.9, 0.05], [0.15, 0.8, 0.05], [0.25, 0.7, 0.05]])
    boxes, kept, labels = heads.postprocess_detections(scores.log(), torch.zeros(3, 12), proposals, [(50, 50)])
    empty = boxes[0][:, 2] <= boxes[0][:, 0]
    assert (int(empty.sum()), len(boxes[0])) == (empty_kept, count)
    assert set(labels[0].tolist()) == {1}
    assert kept[0].tolist() == pytest.approx(
        {"torchvision": [0.8, 0.7], "mmdetection": [0.9, 0.8], "detectron2": [0.8]}[library]
    )


@pytest.mark.parametrize(("library", "first"), [("mmdetection", 0.0), ("detectron2", 40.0)])
def test_proposals_that_are_equally_sure_as_probabilities(library, first):
    """Logits of 30 and 31 have the same sigmoid in float32; only by logit does the second proposal come first."""
    rpn = model_of("faster_rcnn", conventions={"edge_cases": library}).rpn
    boxes = torch.tensor([[[0.0, 0.0, 20.0, 20.0], [40.0, 0.0, 60.0, 20.0]]])
    (kept, _) = rpn.filter_proposals(boxes, torch.tensor([[30.0, 31.0]]), [(64, 64)], [1, 1])
    assert kept[0][:, 0].tolist() == [first, 40.0 - first]


@pytest.mark.parametrize(("after", "count"), [(False, 2), (True, 1)])
def test_retinanet_clips_before_or_after_suppression(after, count):
    """Boxes of 40 x 20, 6 right of each other: IoU 34/46. The image ends at column 10, which leaves 10 and 4 columns
    of them: IoU 4/10, and both stay where boxes are clipped first (threshold 0.5)."""
    model = model_of("retinanet", conventions={"clip_after_nms": after})
    anchors = torch.tensor([[0.0, 0.0, 40.0, 20.0], [6.0, 0.0, 46.0, 20.0]])
    logits = torch.tensor([[[-9.0, 2.0, -9.0], [-9.0, 1.0, -9.0]]])
    outputs = {"cls_logits": [logits], "bbox_regression": [torch.zeros(1, 2, 4)]}
    (result,) = model.postprocess_detections(outputs, [[anchors]], [(20, 10)])
    assert result["boxes"].tolist() == [[0.0, 0.0, 10.0, 20.0], [6.0, 0.0, 10.0, 20.0]][:count]
    assert set(result["labels"].tolist()) == {1}


THREE = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [0.0, 0.0, 10.0, 4.0]])
"""Each within the one before: overlaps of the first with the others 0.8 and 0.4, of the second with the third 0.5."""


@pytest.mark.parametrize(
    ("settings", "kept", "scores"),
    [
        ({}, [0, 2], [0.9, 0.7]),
        ({"suppression": "linear"}, [0, 2, 1], [0.9, 0.7, 0.8 * 0.2]),
        # The third is chosen next (0.7 e^-0.32), before the second (0.8 e^-1.28), which it lowers by e^-0.5.
        (
            {"suppression": "gaussian"},
            [0, 2, 1],
            [0.9, 0.7 * math.exp(-0.32), 0.8 * math.exp(-1.28) * math.exp(-0.5)],
        ),
        (
            {"suppression": "gaussian", "suppression_sigma": 1.28},
            [0, 2, 1],
            [0.9, 0.7 * math.exp(-0.125), 0.8 * math.exp(-0.5) * math.exp(-0.25 / 1.28)],
        ),
        ({"suppression": "linear", "suppression_least_score": 0.2}, [0, 2], [0.9, 0.7]),
    ],
)
def test_suppression_by_hand(settings, kept, scores):
    suppress = Suppression.of(Conventions(**settings), 0.6)
    labels = torch.tensor([1, 1, 1])
    found, left = suppress(THREE, torch.tensor([0.9, 0.8, 0.7]), labels, 100)
    assert found.tolist() == kept
    assert left.tolist() == pytest.approx(scores)
    assert suppress(THREE, torch.tensor([0.9, 0.8, 0.7]), labels, 1)[0].tolist() == [0]
    assert [len(part) for part in suppress(THREE[:0], torch.zeros(0), labels[:0], 100)] == [0, 0]


@pytest.mark.parametrize("kind", ["hard", "linear"])
def test_suppression_across_classes(kind):
    labels, scores = torch.tensor([1, 2, 1]), torch.tensor([0.9, 0.8, 0.7])
    apart = Suppression.of(Conventions(suppression=kind), 0.6)(THREE, scores, labels, 100)
    across = Suppression.of(Conventions(suppression=kind, suppression_across_classes=True), 0.6)
    assert apart[1].tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert across(THREE, scores, labels, 2)[0].tolist() == [0, 2]


def test_proposals_outside_of_the_image_and_thin_ones():
    boxes = torch.tensor([[[-8.0, 0.0, 20.0, 20.0], [30.0, 0.0, 33.0, 20.0], [64.0, 0.0, 80.0, 20.0]]])
    for settings, left in (
        ({}, [0.0, 30.0]),
        ({"clip_proposals": False}, [-8.0, 30.0, 64.0]),
        ({"smallest_box": 3.0}, [0.0]),
        ({"smallest_box": -1.0}, [0.0, 30.0, 64.0]),
    ):
        rpn = model_of("faster_rcnn", conventions=settings).rpn
        (kept, _) = rpn.filter_proposals(boxes, torch.tensor([[3.0, 2.0, 1.0]]), [(64, 64)], [3])
        assert kept[0][:, 0].tolist() == left


def test_numbers_of_proposals_and_candidates():
    model = model_of("faster_rcnn", proposals=50, proposals_before_nms=70, proposal_nms_threshold=0.6)
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n(), model.rpn.nms_thresh) == (70, 50, 0.6)
    assert model_of("faster_rcnn", proposals=50).rpn.pre_nms_top_n() == 50
    for detector in ("retinanet", "fcos"):
        assert model_of(detector, fpn_channels=64, candidates_per_level=30).topk_candidates == 30
    plain = {"backbone": "resnet50", "widths": None}
    named = model_of("fasterrcnn_mobilenet_v3_large_320_fpn", **plain, proposals_before_nms=70)
    assert (named.rpn.pre_nms_top_n(), named.rpn.post_nms_top_n()) == (70, 150)


@pytest.mark.parametrize("detector", ["fcos", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_detector_of_torchvisions_own_refuses_what_it_cannot_follow(detector):
    keys = {"conventions": {"suppression": "linear", "clip_detections": False}}
    keys |= {"fpn_channels": 64} if detector == "fcos" else {"backbone": "resnet50", "widths": None}
    with pytest.raises(RecipeError, match=r"conventions\.clip_detections, conventions\.suppression"):
        model_of(detector, **keys)


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
def test_images_are_stretched_where_their_ratio_is_not_kept(detector):
    model = model_of(detector, fpn_channels=64, conventions={"keep_ratio": False})
    resized, _ = model.transform([torch.rand(3, 40, 40), torch.rand(3, 200, 50)])
    assert resized.image_sizes == [(96, 160)] * 2


def spread(model: nn.Module) -> nn.Module:
    """Weights that give many overlapping detections of every class."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "cls" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1 and ("cls" in name or "bbox" in name):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    return model


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_post_processing_is_torchvisions_but_for_the_edge_cases(detector):
    stock = spread(model_of(detector, proposals=100))
    foreign = spread(model_of(detector, proposals=100, conventions={"edge_cases": "detectron2"}))
    if detector == "faster_rcnn":
        assert isinstance(foreign.roi_heads, ConventionRoIHeads)
        foreign.roi_heads.box_roi_pool = stock.roi_heads.box_roi_pool
    else:
        assert isinstance(foreign, ConventionRetinaNet)
    images = [torch.rand(3, 96, 128), torch.rand(3, 90, 100)]
    with torch.no_grad():
        for expected, given in zip(stock(images), foreign(images), strict=True):
            wide = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(dim=1)
            assert int(wide.sum()) >= 5
            for key in expected:
                assert torch.equal(given[key], expected[key][wide])


@pytest.mark.parametrize("conventions", [MMDETECTION, DETECTRON2], ids=["mmdetection", "detectron2"])
@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_conventions_change_no_key(detector, conventions):
    ours = model_of(detector, conventions=conventions, fpn_channels=24)
    plain = model_of(detector, conventions={"p6_from": "c5"}, fpn_channels=24)
    plain.load_state_dict(ours.state_dict(), strict=True)
    batch = [torch.rand(3, 96, 100)]
    with torch.no_grad():
        assert {key: value.shape[1:] for key, value in ours(batch)[0].items()} == {
            key: value.shape[1:] for key, value in plain(batch)[0].items()
        }
