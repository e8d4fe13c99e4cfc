"""mmdetection's checkpoints: wrappers of 2.x and 3.x, what their configuration decides, and what is refused."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from oracles.foreign_detectors import ForeignDetector

from defeat_cli.checkpoints import mmdet_config
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.errors import CheckpointError


@pytest.fixture(scope="module")
def faster_rcnn():
    return ForeignDetector("mmdet", True, backbone="resnet18", fpn=8, head=8, classes=2).weights


@pytest.fixture(scope="module")
def retinanet():
    return ForeignDetector("mmdet", False, backbone="resnet18", fpn=8, classes=2).weights


def load(path, weights, **content):
    torch.save({"state_dict": weights, **content}, path / "teacher.pth")
    return load_weights(path / "teacher.pth")


CONFIG_2X = """
model = dict(
    type='FasterRCNN',
    pretrained='open-mmlab://detectron2/resnet50_caffe',
    backbone=dict(type='ResNet', depth=18, norm_cfg=dict(type='BN', requires_grad=False), style='caffe'),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=8, num_outs=5),
    rpn_head=dict(
        type='RPNHead',
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 3.0], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=2)),
        bbox_head=dict(type='Shared2FCBBoxHead',
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False))),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=500, nms=dict(type='nms', iou_threshold=0.7)),
        rcnn=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50)))
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(1000, 600), flip=False,
                      transforms=[dict(type='Resize', keep_ratio=True)])]
"""


def test_a_2x_checkpoint_with_its_configuration(tmp_path, faster_rcnn):
    meta = {"mmdet_version": "2.25.0", "config": CONFIG_2X, "CLASSES": ("cat", "dog"), "epoch": 12}
    weights = load(tmp_path, faster_rcnn, meta=meta, optimizer={"state": {}})
    built = weights.architecture
    assert weights.classes == ["cat", "dog"]
    assert (weights.short_side, weights.long_side) == (600, 1000)
    assert built.anchor_sizes == [[16.0], [32.0], [64.0], [128.0], [256.0]]
    assert built.anchor_ratios == [0.5, 1.0, 3.0]
    assert (built.proposals, built.score_threshold, built.nms_threshold, built.detections_per_image) == (
        500,
        0.01,
        0.6,
        50,
    )
    conventions = built.conventions
    assert conventions.stride_in_1x1
    assert conventions.image_mean == pytest.approx([123.675 / 255, 116.28 / 255, 103.53 / 255])
    assert conventions.image_std == pytest.approx([1 / 255] * 3)
    assert conventions.roi_align_sampling_ratio == 2
    assert conventions.roi_align_aligned


def test_one_class_is_a_bare_string_in_2x(tmp_path):
    weights = ForeignDetector("mmdet", True, backbone="resnet18", fpn=8, head=8, classes=1).weights
    assert load(tmp_path, weights, meta={"CLASSES": "person"}).classes == ["person"]


def test_a_training_checkpoint_of_3x_with_objects_in_it(tmp_path, monkeypatch, faster_rcnn):
    module = types.ModuleType("mmengine_hub")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {"meta": {"dataset_meta": {"CLASSES": ("a", "b")}}, "message_hub": {"loss": module.HistoryBuffer()}}
    torch.save({"state_dict": faster_rcnn, **content}, tmp_path / "epoch_12.pth")
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(Exception, match=r"HistoryBuffer|weights_only"):
        torch.load(tmp_path / "epoch_12.pth", weights_only=True)
    assert load_weights(tmp_path / "epoch_12.pth").classes == ["a", "b"]


def test_moving_averages_and_a_distributed_prefix_are_put_aside(tmp_path, faster_rcnn):
    wrapped = {f"module.{key}": value for key, value in faster_rcnn.items()}
    plain = load(tmp_path, faster_rcnn)
    averaged = load(tmp_path, {**wrapped, "ema_backbone_conv1_weight": torch.ones(1)})
    assert averaged.state_dict.keys() == plain.state_dict.keys()
    assert any("moving average" in note for note in averaged.notes)


def test_deltas_for_all_classes_alike(tmp_path, faster_rcnn):
    reg = "roi_head.bbox_head.fc_reg"
    agnostic = {**faster_rcnn, f"{reg}.weight": torch.ones(4, 8), f"{reg}.bias": torch.arange(1.0, 5.0)}
    found = load(tmp_path, agnostic).state_dict["roi_heads.box_predictor.bbox_pred.bias"]
    assert found.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 1, 2, 3, 4]


def test_where_p6_comes_from_and_whether_a_relu_follows(tmp_path, retinanet):
    from_c5 = load(tmp_path, retinanet).architecture.conventions
    assert (from_c5.p6_from, from_c5.p7_relu) == ("c5", False)
    key = "neck.fpn_convs.3.conv.weight"
    config = "model = dict(type='RetinaNet', neck=dict(add_extra_convs='on_output', relu_before_extra_convs=True))"
    from_p5 = load(tmp_path, {**retinanet, key: torch.zeros(8, 8, 3, 3)}, meta={"cfg": config}).architecture.conventions
    assert (from_p5.p6_from, from_p5.p7_relu) == ("p5", True)


def test_retinanet_anchors_are_not_rounded(tmp_path, retinanet):
    built = load(tmp_path, retinanet).architecture
    assert built.anchor_sizes[0] == pytest.approx([32, 40.3174736, 50.7968337])
    assert built.anchor_sizes[4] == pytest.approx([512, 645.0795776, 812.7493386])
    assert not built.conventions.rounded_anchors


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("roi_head.bbox_head.0.fc_cls.weight", "Cascade R-CNN's several box heads"),
        ("roi_head.mask_head.convs.0.conv.weight", "a mask head"),
        ("roi_head.bbox_head.shared_convs.0.conv.weight", "a box head with convolutions"),
        ("backbone.layer2.0.conv2.conv_offset.weight", "deformable convolutions"),
        ("backbone.layer1.0.gn1.weight", "GroupNorm in the backbone"),
        ("backbone.stem.0.weight", "a ResNet with a deep stem"),
        ("backbone.layer1.0.downsample.2.weight", "a backbone that is no plain ResNet"),
        ("neck.lateral_convs.0.bn.weight", "a normalised FPN"),
        ("neck.downsample_convs.0.conv.weight", "another neck than FPN"),
        ("rpn_head.rpn_conv.0.conv.weight", "another RPN"),
        ("panoptic.weight", "an unknown part"),
    ],
)
def test_parts_that_cannot_be_represented_are_refused_by_name(tmp_path, faster_rcnn, key, said):
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, {**faster_rcnn, key: torch.ones(1)})
    assert said in str(caught.value)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("model = dict(type='DoubleHeadRCNN')", "model.type = 'DoubleHeadRCNN'"),
        ("model = dict(type='FasterRCNN', backbone=dict(type='Res2Net'))", "model.backbone.type = 'Res2Net'"),
        ("model = dict(type='FasterRCNN', neck=dict(type='PAFPN'))", "model.neck.type = 'PAFPN'"),
        (
            "model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(use_sigmoid=True))))",
            "model.roi_head.bbox_head.loss_cls.use_sigmoid = True",
        ),
        (
            "model = dict(roi_head=dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.05, 0.05, 0.1, 0.1]))))",
            "target_stds = [0.05, 0.05, 0.1, 0.1]",
        ),
        (
            "model = dict(rpn_head=dict(anchor_generator=dict(strides=[8, 16, 32, 64, 128])))",
            "strides = [8, 16, 32, 64, 128]",
        ),
    ],
)
def test_settings_that_cannot_be_represented_are_refused_by_name(tmp_path, faster_rcnn, config, said):
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, faster_rcnn, meta={"cfg": config})
    assert said in str(caught.value)


def test_another_one_stage_head_is_refused_by_name(tmp_path, retinanet):
    fcos = {key: value for key, value in retinanet.items() if not key.startswith("bbox_head")}
    with pytest.raises(CheckpointError, match=r"a one-stage head that is not RetinaNet's: bbox_head\.conv_cls\.weight"):
        load(tmp_path, {**fcos, "bbox_head.conv_cls.weight": torch.ones(1)})


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
@pytest.mark.parametrize("part", ["backbone.", "neck.", "rpn_head.", "roi_head.", "bbox_head."])
def test_half_a_detector_is_refused(tmp_path, request, family, part):
    whole = request.getfixturevalue(family)
    half = {key: value for key, value in whole.items() if not key.startswith(part)}
    if len(half) < len(whole):
        with pytest.raises(CheckpointError, match=r"half a detector|no detector of a known format"):
            load(tmp_path, half)


def test_impossible_settings_are_refused(tmp_path, faster_rcnn):
    config = "model = dict(type='FasterRCNN', test_cfg=dict(rcnn=dict(score_thr=7.0)))"
    with pytest.raises(CheckpointError, match=r"settings cannot be used:\s+score_threshold"):
        load(tmp_path, faster_rcnn, meta={"cfg": config})


def test_mmdetection_1_is_refused(tmp_path, faster_rcnn):
    with pytest.raises(CheckpointError, match=r"mmdetection 1\.2\.0"):
        load(tmp_path, faster_rcnn, meta={"mmdet_version": "1.2.0"})


def test_a_configuration_is_read_and_not_run():
    text = "import os\na = os.system('touch x')\nb = dict(c=[1, (2, -3.5)], **{'d': None})\ne = {'f': True}\ng = 1 + 1"
    assert mmdet_config.parse(text) == {"a": None, "b": {"c": [1, [2, -3.5]]}, "e": {"f": True}, "g": None}
    assert mmdet_config.parse("this is = no python") == {}
