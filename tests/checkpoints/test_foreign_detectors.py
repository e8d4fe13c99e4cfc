"""Converted detectors compute what mmdetection and detectron2 compute, from the file to the final boxes."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles.foreign_configs import as_text, changed, detectron2_config, mmdet_config
from oracles.foreign_detectors import STYLES, ForeignDetector
from torchvision.models.detection.image_list import ImageList

from defeat_cli.checkpoints import detectron2, mmdet
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.weights import Weights, load_strict
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError

FORMATS = Path(__file__).resolve().parents[3] / "shared" / "formats"
SIZE = (100, 150)  # no multiple of any stride
CASES = [(style, two_stage) for style in STYLES for two_stage in (True, False)]
BACKBONES = {"mmdet": "resnet18", "mmdet caffe": "resnet50", "detectron2": "resnet50"}


def content_of(original: ForeignDetector, folder: Path, changes: dict | None = None) -> dict[str, Any]:
    """The original's checkpoint with its configuration, as its library leaves them."""
    if original.detectron2:
        config = changed(detectron2_config(original), changes or {})
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return {"model": original.weights, "iteration": 89999}
    names = tuple(f"thing {i}" for i in range(original.classes))
    config = as_text(changed(mmdet_config(original), changes or {}))
    meta = {"cfg": config, "dataset_meta": {"classes": names}, "mmdet_version": "3.3.0"}
    return {"meta": meta, "state_dict": original.weights}


def loaded(original: ForeignDetector, folder: Path, changes: dict | None = None) -> tuple[Weights, Detector]:
    form = detectron2 if original.detectron2 else mmdet
    return built(form.to_weights(content_of(original, folder, changes), str(folder / "teacher.pth")))


def built(weights: Weights) -> tuple[Weights, Detector]:
    classes = weights.classes or [str(i) for i in range(weights.num_classes)]
    detector = build_detector(weights.architecture, classes, [min(SIZE)], max(SIZE)).eval()
    load_strict(detector.model, weights.state_dict, "teacher")
    return weights, detector


@cache
def small(library: str, two_stage: bool) -> tuple[ForeignDetector, torch.Tensor, tuple[torch.Tensor, ...]]:
    """A small detector, an image, and what it finds there as its library usually sets it."""
    original = ForeignDetector(library, two_stage, backbone="resnet18", fpn=8, head=16)
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
    return original, image, original.detections(image)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {'two' if case[1] else 'one'}-stage")
def pair(request, tmp_path_factory):
    """(original, weights, detector, image): the same weights in the oracle and, through a file, in our detector."""
    original = ForeignDetector(*request.param, backbone=BACKBONES[request.param[0]])
    folder = tmp_path_factory.mktemp("teacher")
    torch.save(content_of(original, folder), folder / "teacher.pth")
    weights, detector = built(load_weights(folder / "teacher.pth"))
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
    return original, weights, detector, image


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal to 1e-4 of the largest value, and not all the same."""
    assert ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() < 1e-4 * theirs.abs().max()) and bool(theirs.std() > 0)


@torch.no_grad()
def test_features_and_anchors(pair):
    original, _, detector, image = pair
    batch = detector.prepare([image])
    ours, theirs = detector.features(batch), original.features(image)
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    generator = detector.anchor_generator
    assert close(generator(ImageList(batch.pixels, batch.sizes), ours)[0], torch.cat(original.anchors(theirs)))


@torch.no_grad()
def test_heads(pair):
    original, _, detector, image = pair
    batch = detector.prepare([image])
    ours, theirs = detector.features(batch), original.features(image)
    model = detector.model
    if not original.two_stage:
        logits, deltas = original.dense(theirs)
        found = model.head(ours)
        assert close(found["cls_logits"][0, :, 1:], torch.cat(logits))
        assert found["cls_logits"][0, :, 0].sigmoid().max() == 0
        assert close(found["bbox_regression"][0], torch.cat(deltas))
        return
    for a, b in zip(model.rpn.head(ours), original.rpn(theirs), strict=True):
        assert all(close(x, y) for x, y in zip(a, b, strict=True))
    boxes = torch.tensor([[3.0, 5, 40, 30], [0, 0, 150, 100], [70, 20, 74, 90], [10.5, 10.5, 12.5, 11.5]])
    pooled = model.roi_heads.box_roi_pool(detector._named(ours), [boxes], batch.sizes)
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    their_logits, their_deltas = original.box_head(theirs, boxes)
    assert close(logits[:, 1:], their_logits[:, :-1])
    assert close(logits[:, 0], their_logits[:, -1])
    assert close(deltas[:, 4:], their_deltas)


@torch.no_grad()
def test_detections_are_the_same_set(pair):
    original, _, detector, image = pair
    boxes, _, _ = original.detections(image)
    assert len(boxes) > 20
    assert shared(detector.detect([image])[0], original.detections(image)) > 0.97


def shared(found: dict[str, torch.Tensor], expected: tuple[torch.Tensor, ...]) -> float:
    """Share of the expected detections that were found, to 1e-4; 0 where their numbers differ by more than 2.

    An overlap that is the threshold to the last digit may fall on either side.
    """
    boxes, scores, classes = expected
    if abs(len(boxes) - len(found["boxes"])) > 2:
        return 0.0
    rows = torch.cat([boxes / max(SIZE), scores[:, None], classes[:, None]], dim=1)
    ours = torch.cat([found["boxes"] / max(SIZE), found["scores"][:, None], found["labels"][:, None] - 1.0], dim=1)
    nearest = torch.cdist(rows, ours, p=float("inf")).min(dim=1).values
    return float((nearest < 1e-4).float().mean())


RPN, BOX, RETINA = "model.test_cfg.rpn", "model.roi_head.bbox_head", "model.bbox_head"
RCNN = "model.test_cfg.rcnn"
LINEAR = {"type": "soft_nms", "iou_threshold": 0.4, "min_score": 0.05}
IS_LINEAR = {"soft": "linear", "overlap": 0.4, "soft_least": 0.05, "detections": 1000}
GAUSSIAN = {"type": "soft_nms", "method": "gaussian", "sigma": 0.3, "min_score": 0.02}
MMDET_TWO_STAGE = [
    ({f"{RPN}.nms.iou_threshold": 0.85}, {"proposal_overlap": 0.85}),
    ({f"{RPN}.nms_pre": 40}, {"proposals_before": 40}),
    ({f"{RPN}.nms_pre": -1}, {"proposals_before": 10**6}),
    ({f"{RPN}.max_per_img": 30}, {"proposals": 30}),
    ({f"{RPN}.min_bbox_size": 12}, {"proposal_side": 12.0}),
    ({"model.rpn_head.bbox_coder.target_stds": [0.5] * 4}, {"proposal_spread": (0.5,) * 4}),
    ({"model.rpn_head.bbox_coder.target_means": [0.1, 0, 0, 0.2]}, {"proposal_mean": (0.1, 0.0, 0.0, 0.2)}),
    ({"model.rpn_head.bbox_coder.clip_border": False}, {"clip_proposals": False}),
    ({"model.rpn_head.anchor_generator.scales": [5]}, {"anchor_scale": 0.625}),
    ({f"{BOX}.bbox_coder.target_stds": [0.05, 0.05, 0.1, 0.1]}, {"spread": (0.05, 0.05, 0.1, 0.1)}),
    ({f"{BOX}.bbox_coder": {"type": "DeltaXYWHBBoxCoder"}}, {"spread": (1.0,) * 4}),
    ({f"{BOX}.bbox_coder.target_means": [0, 0.1, 0.3, 0]}, {"mean": (0.0, 0.1, 0.3, 0.0)}),
    ({f"{BOX}.bbox_coder.clip_border": False}, {"clip": False}),
    ({"model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": 1}, {"sampling": 1}),
    ({"model.roi_head.bbox_roi_extractor.roi_layer.aligned": False}, {"aligned": False}),
    ({"model.backbone.norm_cfg.eps": 0.1}, {"eps": 0.1}),
    ({f"{RCNN}.score_thr": 0.5}, {"least_score": 0.5}),
    ({f"{RCNN}.nms.iou_threshold": 0.2}, {"overlap": 0.2}),
    ({f"{RCNN}.nms": LINEAR, f"{RCNN}.max_per_img": 1000}, IS_LINEAR),
    ({f"{RCNN}.nms": GAUSSIAN}, {"soft": "gaussian", "sigma": 0.3, "soft_least": 0.02}),
    (
        {f"{RCNN}.nms.class_agnostic": True, f"{RCNN}.max_per_img": 1000},
        {"across_classes": True, "detections": 1000},
    ),
    ({f"{RCNN}.max_per_img": 7}, {"detections": 7}),
]
MMDET_ONE_STAGE = [
    ({"model.test_cfg.nms_pre": 30}, {"candidates": 30}),
    ({"model.test_cfg.score_thr": 0.999}, {"least_score": 0.999}),
    ({"model.test_cfg.nms": LINEAR, "model.test_cfg.max_per_img": 1000}, IS_LINEAR),
    ({"model.test_cfg.nms.class_agnostic": True}, {"across_classes": True}),
    ({"model.test_cfg.max_per_img": 7}, {"detections": 7}),
    ({f"{RETINA}.bbox_coder.target_stds": [0.1, 0.1, 0.2, 0.2]}, {"spread": (0.1, 0.1, 0.2, 0.2)}),
    ({f"{RETINA}.bbox_coder.target_means": [0.1, 0, 0, 0.2]}, {"mean": (0.1, 0.0, 0.0, 0.2)}),
    ({f"{RETINA}.bbox_coder.clip_border": False}, {"clip": False}),
    ({f"{RETINA}.anchor_generator.octave_base_scale": 3}, {"anchor_scale": 0.75}),
    ({f"{RETINA}.anchor_generator.scale_major": False}, {"sizes_first": True}),
]
DETECTRON2_TWO_STAGE = [
    ({"MODEL.RPN.NMS_THRESH": 0.85}, {"proposal_overlap": 0.85}),
    ({"MODEL.RPN.PRE_NMS_TOPK_TEST": 40}, {"proposals_before": 40}),
    ({"MODEL.RPN.POST_NMS_TOPK_TEST": 30}, {"proposals": 30}),
    ({"MODEL.RPN.BBOX_REG_WEIGHTS": [2.0, 2.0, 1.0, 1.0]}, {"proposal_spread": (0.5, 0.5, 1.0, 1.0)}),
    ({"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 12}, {"proposal_side": 12.0}),
    ({"MODEL.ANCHOR_GENERATOR.SIZES": [[20], [40], [80], [160], [320]]}, {"anchor_scale": 0.625}),
    ({"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.75}, {"least_score": 0.75}),
    ({"MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.2}, {"overlap": 0.2}),
    ({"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [20.0, 20.0, 10.0, 10.0]}, {"spread": (0.05, 0.05, 0.1, 0.1)}),
    ({"MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 1}, {"sampling": 1}),
    ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign"}, {"aligned": False}),
    ({"TEST.DETECTIONS_PER_IMAGE": 7}, {"detections": 7}),
]
DETECTRON2_ONE_STAGE = [
    ({"MODEL.RETINANET.TOPK_CANDIDATES_TEST": 30}, {"candidates": 30}),
    ({"MODEL.RETINANET.SCORE_THRESH_TEST": 0.9997}, {"least_score": 0.9997}),
    ({"MODEL.RETINANET.NMS_THRESH_TEST": 0.2}, {"overlap": 0.2}),
    ({"MODEL.RETINANET.BBOX_REG_WEIGHTS": [2.0, 2.0, 1.0, 1.0]}, {"spread": (0.5, 0.5, 1.0, 1.0)}),
]
CHANGES = [
    *[("mmdet", True, *change) for change in MMDET_TWO_STAGE],
    *[("mmdet", False, *change) for change in MMDET_ONE_STAGE],
    *[("detectron2", True, *change) for change in DETECTRON2_TWO_STAGE],
    *[("detectron2", False, *change) for change in DETECTRON2_ONE_STAGE],
]


@torch.no_grad()
@pytest.mark.parametrize(("library", "two_stage", "changes", "meaning"), CHANGES)
def test_a_setting_has_the_effect_that_it_has_in_its_library(tmp_path, library, two_stage, changes, meaning):
    """The first of what is meant makes the difference: without it other detections are right."""
    original, image, usual = small(library, two_stage)
    _, detector = loaded(original, tmp_path, changes)
    found = detector.detect([image])[0]
    assert len(found["boxes"]) >= 5
    assert shared(found, original.with_settings(**meaning).detections(image)) > 0.97
    rest = dict(list(meaning.items())[1:])
    assert shared(found, original.with_settings(**rest).detections(image) if rest else usual) < 0.97


def test_what_was_read_is_said(pair):
    original, weights, _, _ = pair
    assert weights.format == ("detectron2" if original.detectron2 else "mmdet")
    assert weights.architecture.backbone == original.backbone
    assert weights.num_classes == 4
    said = "\n".join(weights.notes)
    assert ("BGR" in said) == original.style.bgr
    assert original.backbone in said
    assert weights.assumptions == []
    assert weights.stated
    if original.detectron2:
        assert (weights.classes, weights.short_side, weights.long_side) == (None, 800, 1333)
    else:
        assert weights.classes == [f"thing {i}" for i in range(4)]
        assert (weights.short_side, weights.long_side) == (480, 640)


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    lines = re.findall(r"^(\S+) \((.*?)\) torch\.\w+$", path.read_text(), re.MULTILINE)
    return {key: tuple(int(n) for n in shape.split(",") if n.strip()) for key, shape in lines}


REAL = {
    "mmdet_faster_rcnn_r50": ("mmdet", True, "resnet50"),
    "mmdet_faster_rcnn_r101": ("mmdet", True, "resnet101"),
    "mmdet_retinanet_r50": ("mmdet", False, "resnet50"),
    "d2_faster_rcnn_R_50": ("detectron2", True, "resnet50"),
    "d2_faster_rcnn_R_101": ("detectron2", True, "resnet101"),
    "d2_retinanet_R_50": ("detectron2", False, "resnet50"),
}


@pytest.mark.skipif(not FORMATS.is_dir(), reason="the key lists of real models are not here")
@pytest.mark.parametrize("name", REAL)
def test_every_key_of_a_real_model_is_used(name):
    """All keys of our detector are filled, and those left over are BatchNorm's counters."""
    style, two_stage, backbone = REAL[name]
    shapes = shapes_in(FORMATS / f"{name}.keys.txt")
    oracle = ForeignDetector.__new__(ForeignDetector)
    oracle.__dict__.update(style=STYLES[style], two_stage=two_stage, backbone=backbone, classes=80)
    oracle.detectron2, oracle.names = (
        style == "detectron2",
        ForeignDetector(style, two_stage, backbone="resnet18").names,
    )
    assert oracle.shapes(256, 1024) == shapes  # the oracle's names are the real ones

    content = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    form = detectron2 if style == "detectron2" else mmdet
    assert form.matches(content)
    weights = form.to_weights(content, name)
    assert weights.num_classes == 80
    assert weights.classes[0] == "person"
    with torch.device("meta"):
        detector = build_detector(weights.architecture, weights.classes, [800], 1333)
    expected = detector.model.state_dict()
    assert {key: value.shape for key, value in weights.state_dict.items()} == {k: v.shape for k, v in expected.items()}
    counters = sum(key.endswith("num_batches_tracked") for key in shapes)
    assert len(weights.state_dict) == len(shapes) - counters


@torch.no_grad()
def test_images_are_stretched_where_their_ratio_is_not_kept(tmp_path):
    resize = {"test_dataloader.dataset.pipeline.1.keep_ratio": False}
    weights, _ = loaded(small("mmdet", True)[0], tmp_path, resize)
    assert (weights.short_side, weights.long_side) == (480, 640)
    detector = build_detector(weights.architecture, weights.classes, [96], 160)
    assert detector.prepare([torch.rand(3, 100, 100)]).sizes == [(96, 160)]
    assert detector.prepare([torch.rand(3, 300, 60)]).sizes == [(96, 160)]


@torch.no_grad()
@pytest.mark.parametrize("library", ["mmdet", "detectron2"])
def test_the_caller_may_say_what_the_network_takes_where_nothing_else_does(tmp_path, library):
    """A model of torchvision's ResNet, trained on RGB, in a file that says nothing: detectron2's default is wrong."""
    style = replace(STYLES[library], bgr=False, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    style = replace(style, stride_in_1x1=False)
    original = ForeignDetector(style, True, backbone="resnet50", fpn=8, head=16)
    key = "model" if original.detectron2 else "state_dict"
    torch.save({key: original.weights}, tmp_path / "teacher.pth")
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))

    said = Architecture(conventions=Conventions(channels="rgb"))
    for given, right in ((None, library == "mmdet"), (said, True)):
        weights = load_weights(tmp_path / "teacher.pth", given)
        assert any(line.startswith("assumed") for line in weights.assumptions)
        _, detector = built(weights)
        ours, theirs = detector.features(detector.prepare([image])), original.features(image)
        assert all(close(a, b) for a, b in zip(ours, theirs, strict=True)) == right


def test_the_usual_channel_order_alone_leaves_what_goes_with_it(tmp_path):
    content = {"model": ForeignDetector("detectron2", True, fpn=8, head=16).weights}
    said = Architecture(conventions=Conventions(channels="bgr"))
    plain, told = (detectron2.to_weights(content, str(tmp_path / "x.pth"), given) for given in (None, said))
    assert told.architecture == replace(plain.architecture, conventions=told.architecture.conventions)
    assert told.architecture.conventions == replace(plain.architecture.conventions, channels="bgr")


def test_the_caller_cannot_contradict_the_file(tmp_path):
    content = content_of(ForeignDetector("mmdet caffe", True, backbone="resnet18", fpn=8, head=16), tmp_path)
    with pytest.raises(CheckpointError, match=r"conventions\.channels is rgb, but it was trained on BGR"):
        mmdet.to_weights(content, "x.pth", Architecture(conventions=Conventions(channels="rgb")))


def test_without_a_configuration_the_caller_may_say_that_the_style_is_caffe(tmp_path):
    original = ForeignDetector("mmdet caffe", True, backbone="resnet18")
    torch.save({"state_dict": original.weights}, tmp_path / "teacher.pth")
    plain = load_weights(tmp_path / "teacher.pth")
    told = load_weights(tmp_path / "teacher.pth", Architecture(conventions=Conventions(stride_in_1x1=True)))
    stem = "backbone.body.conv1.weight"
    assert torch.equal(plain.state_dict[stem], original.weights["backbone.conv1.weight"])
    assert torch.equal(told.state_dict[stem], original.weights["backbone.conv1.weight"].flip(1))
    assert told.architecture.conventions.image_std == pytest.approx([1 / 255] * 3)
