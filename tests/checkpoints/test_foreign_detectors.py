"""Converted detectors compute what mmdetection and detectron2 compute, from the file to the final boxes."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from oracles.foreign_detectors import STYLES, ForeignDetector

from defeat_cli.checkpoints import detectron2, mmdet
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.weights import load_strict
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.detectors.contract import image_list
from defeat_cli.detectors.zoo import build_detector

FORMATS = Path(__file__).resolve().parents[3] / "shared" / "formats"
SIZE = (100, 150)  # no multiple of any stride
CASES = [(style, two_stage) for style in STYLES for two_stage in (True, False)]
BACKBONES = {"mmdet": "resnet18", "mmdet caffe": "resnet50", "detectron2": "resnet50"}


def save(original: ForeignDetector, path: Path) -> Path:
    """The original's weights in the wrapping that its library gives them."""
    if original.detectron2:
        arrays = {key: value.numpy() for key, value in original.weights.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol=2))
        return path
    style = original.style
    config = f"""
model = dict(
    type='{"FasterRCNN" if original.two_stage else "RetinaNet"}',
    data_preprocessor=dict(type='DetDataPreprocessor', mean={list(style.mean)}, std={list(style.std)},
                           bgr_to_rgb={not style.bgr}, pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=50, style='{"caffe" if style.stride_in_1x1 else "pytorch"}'),
    neck=dict(type='FPN', add_extra_convs={False if original.two_stage else "on_input"!r}))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(640, 480), keep_ratio=True)]
"""
    names = tuple(f"thing {i}" for i in range(original.classes))
    meta = {"cfg": config, "dataset_meta": {"classes": names}, "mmdet_version": "3.3.0"}
    torch.save({"meta": meta, "state_dict": original.weights}, path)
    return path


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {'two' if case[1] else 'one'}-stage")
def pair(request, tmp_path_factory):
    """(original, weights, detector, image): the same weights in the oracle and, through a file, in our detector."""
    original = ForeignDetector(*request.param, backbone=BACKBONES[request.param[0]])
    weights = load_weights(save(original, tmp_path_factory.mktemp("teacher") / "teacher.pth"))
    classes = weights.classes or [str(i) for i in range(weights.num_classes)]
    detector = build_detector(weights.architecture, classes, [min(SIZE)], max(SIZE)).eval()
    load_strict(detector.model, weights.state_dict, "teacher")
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
    assert close(generator(image_list(batch), ours)[0], torch.cat(original.anchors(theirs)))


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
    boxes, scores, classes = original.detections(image)
    found = detector.detect([image])[0]
    assert len(boxes) > 20
    assert abs(len(boxes) - len(found["boxes"])) <= 2  # an overlap of 0.5 to the last digit may fall on either side
    rows = torch.cat([boxes / max(SIZE), scores[:, None], classes[:, None]], dim=1)
    ours = torch.cat([found["boxes"] / max(SIZE), found["scores"][:, None], found["labels"][:, None] - 1.0], dim=1)
    nearest = torch.cdist(rows, ours, p=float("inf")).min(dim=1).values
    assert (nearest < 1e-4).float().mean() > 0.97


def test_what_was_read_is_said(pair):
    original, weights, _, _ = pair
    assert weights.format == ("detectron2" if original.detectron2 else "mmdet")
    assert weights.architecture.backbone == original.backbone
    assert weights.num_classes == 4
    said = "\n".join(weights.notes)
    assert ("BGR" in said) == original.style.bgr
    assert original.backbone in said
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


def test_without_a_configuration_the_caller_may_say_that_the_style_is_caffe(tmp_path):
    original = ForeignDetector("mmdet caffe", True, backbone="resnet18")
    torch.save({"state_dict": original.weights}, tmp_path / "teacher.pth")
    plain = load_weights(tmp_path / "teacher.pth")
    told = load_weights(tmp_path / "teacher.pth", Architecture(conventions=Conventions(stride_in_1x1=True)))
    stem = "backbone.body.conv1.weight"
    assert torch.equal(plain.state_dict[stem], original.weights["backbone.conv1.weight"])
    assert torch.equal(told.state_dict[stem], original.weights["backbone.conv1.weight"].flip(1))
    assert told.architecture.conventions.image_std == pytest.approx([1 / 255] * 3)
