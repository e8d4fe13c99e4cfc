"""mmdetection's checkpoints: wrappers of 2.x and 3.x, what their configuration decides, and what is refused."""

from __future__ import annotations

import json
import re
import sys
import types
from functools import partial
from random import Random

import pytest
import torch
from oracles.foreign_configs import as_text, changed, mmdet_config, mutated
from oracles.foreign_detectors import ForeignDetector

from defeat_cli.checkpoints import mmdet
from defeat_cli.checkpoints.conversion import renamed
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.mmdet_config import Unread, parse
from defeat_cli.errors import CheckpointError


@pytest.fixture(scope="module")
def original():
    return ForeignDetector("mmdet", True, backbone="resnet18", fpn=8, head=8, classes=2)


@pytest.fixture(scope="module")
def faster_rcnn(original):
    return original.weights


@pytest.fixture(scope="module")
def retinanet():
    return ForeignDetector("mmdet", False, backbone="resnet18", fpn=8, classes=2).weights


def load(path, weights, **content):
    torch.save({"state_dict": weights, **content}, path / "teacher.pth")
    return load_weights(path / "teacher.pth")


def read(weights, config):
    """What a checkpoint with this configuration, or the text of one, is read as."""
    text = config if isinstance(config, str) else as_text(config)
    return mmdet.to_weights({"state_dict": weights, "meta": {"cfg": text}}, "it.pth")


CONFIG_2X = """
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
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
        rpn=dict(nms_pre=600, max_per_img=500, nms=dict(type='nms', iou_threshold=0.8), min_bbox_size=0),
        rcnn=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50)))
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(1000, 600), flip=False,
                      transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'),
                                  dict(type='Normalize', **img_norm_cfg), dict(type='Pad', size_divisor=32),
                                  dict(type='ImageToTensor', keys=['img']), dict(type='Collect', keys=['img'])])]
"""


def test_a_2x_checkpoint_with_its_configuration(tmp_path, faster_rcnn):
    meta = {"mmdet_version": "2.25.0", "config": CONFIG_2X, "CLASSES": ("cat", "dog"), "epoch": 12}
    weights = load(tmp_path, faster_rcnn, meta=meta, optimizer={"state": {}})
    built = weights.architecture
    assert weights.classes == ["cat", "dog"]
    assert (weights.short_side, weights.long_side) == (600, 1000)
    assert built.anchor_sizes == [[16.0], [32.0], [64.0], [128.0], [256.0]]
    assert built.anchor_ratios == [0.5, 1.0, 3.0]
    assert (built.proposals_before_nms, built.proposals, built.proposal_nms_threshold) == (600, 500, 0.8)
    assert (built.score_threshold, built.nms_threshold, built.detections_per_image) == (0.01, 0.6, 50)
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


TEST_STEPS = "test_dataloader.dataset.pipeline"
REFUSED_TWO_STAGE = {
    "model.type": "DoubleHeadRCNN",
    "model.backbone.type": "mmpretrain.ResNet",
    "model.backbone.norm_cfg.type": "GN",
    "model.backbone.dilations": [1, 1, 1, 2],
    "model.backbone.deep_stem": True,
    "model.backbone.plugins": [{"cfg": {"type": "ContextBlock"}}],
    "model.backbone.pretrain_stride": 3,
    "model.neck.type": "PAFPN",
    "model.neck.conv_cfg": {"type": "ConvWS"},
    "model.neck.upsample_cfg": {"mode": "bilinear"},
    "model.rpn_head.anchor_generator.strides": [8, 16, 32, 64, 128],
    "model.rpn_head.anchor_generator.center_offset": 0.5,
    "model.rpn_head.anchor_generator.scales": "wide",
    "model.rpn_head.bbox_coder.type": "TBLRBBoxCoder",
    "model.rpn_head.bbox_coder.add_ctr_clamp": True,
    "model.rpn_head.bbox_coder.target_stds": [1.0, 1.0],
    "model.rpn_head.loss_cls.use_sigmoid": False,
    "model.roi_head.type": "TridentRoIHead",
    "model.roi_head.bbox_roi_extractor.type": "GenericRoIExtractor",
    "model.roi_head.bbox_roi_extractor.finest_scale": 28,
    "model.roi_head.bbox_roi_extractor.roi_layer.type": "RoIPool",
    "model.roi_head.bbox_roi_extractor.roi_layer.pool_mode": "max",
    "model.roi_head.bbox_head.cls_predictor_cfg": {"type": "NormedLinear", "tempearture": 20},
    "model.roi_head.bbox_head.loss_cls.type": "SeesawLoss",
    "model.roi_head.bbox_head.with_avg_pool": True,
    "model.test_cfg.rpn.nms.type": "soft_nms",
    "model.test_cfg.rpn.nms.class_agnostic": True,
    "model.test_cfg.rpn.score_thr": 0.5,
    "model.test_cfg.rcnn.nms": None,
    "model.test_cfg.rcnn.nms.type": "nms_match",
    "model.test_cfg.rcnn.nms.sigma": 0.5,
    "model.test_cfg.rcnn.nms.max_num": 10,
    "model.test_cfg.rcnn.score_thr": 7.0,
    "model.data_preprocessor.pad_size_divisor": 64,
    "model.data_preprocessor.mean": [1.0],
    "model.bbox_head": {"num_classes": 80},
    f"{TEST_STEPS}.1.scale": [(1333, 800), (1333, 640)],
    f"{TEST_STEPS}.1.scale_factor": 2.0,
    f"{TEST_STEPS}.1.interpolation": "nearest",
    f"{TEST_STEPS}.0.color_type": "grayscale",
}
REFUSED_ONE_STAGE = {
    "model.neck.add_extra_convs": "on_lateral",
    "model.bbox_head.type": "RetinaSepBNHead",
    "model.bbox_head.anchor_generator.octave_base_scale": None,
    "model.test_cfg.nms_pre": -1,
    "model.test_cfg.min_bbox_size": 4,
}


@pytest.mark.parametrize(
    ("two_stage", "path", "value"),
    [(True, *row) for row in REFUSED_TWO_STAGE.items()] + [(False, *row) for row in REFUSED_ONE_STAGE.items()],
)
def test_a_setting_that_is_not_understood_is_refused_by_name(faster_rcnn, retinanet, two_stage, path, value):
    config = mmdet_config(ForeignDetector("mmdet", two_stage, backbone="resnet18", fpn=8, head=8, classes=2))
    read(faster_rcnn if two_stage else retinanet, config)
    with pytest.raises(CheckpointError) as caught:
        read(faster_rcnn if two_stage else retinanet, changed(config, {path: value}))
    first, *problems = str(caught.value).splitlines()
    assert first == "it.pth: a detector that cannot be represented here:"
    named = path.replace(f"{TEST_STEPS}.0", f"{TEST_STEPS}.LoadImageFromFile").replace(".1.", ".Resize.")
    named = named.removesuffix(".octave_base_scale").removesuffix(".sigma")
    assert problems
    assert all(problem.strip().startswith(named) for problem in problems)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"type": "LoadImageFromFile"}], "expected a Resize step"),
        ([{"type": "Resize", "scale": (9, 8), "keep_ratio": True}, {"type": "CenterCrop"}], "the step CenterCrop"),
        ([{"type": "Resize", "scale": (8, 9)}], "stretching to 8 x 9, higher than wide"),
        ([{"type": "Resize", "scale": (9, 8)}, {"type": "RandomFlip", "prob": 0.5}], "the step RandomFlip"),
        ([{"type": "Pad", "size_divisor": 32}, {"type": "Resize", "scale": (9, 8)}], "the step Pad"),
        ("loaded from elsewhere", "expected a list of steps"),
        ([7], "the step 7"),
    ],
)
def test_a_pipeline_that_is_not_understood_is_refused(faster_rcnn, original, steps, said):
    with pytest.raises(CheckpointError, match=said):
        read(faster_rcnn, changed(mmdet_config(original), {TEST_STEPS: steps}))


def test_both_generations_mean_the_same(faster_rcnn, original):
    new, old = (read(faster_rcnn, mmdet_config(original, generation)) for generation in (3, 2))
    assert new.architecture == old.architecture
    assert (new.short_side, new.long_side) == (old.short_side, old.long_side) == (480, 640)
    assert torch.equal(new.state_dict["backbone.body.conv1.weight"], old.state_dict["backbone.body.conv1.weight"])


def test_classes_named_in_full_mean_the_same(faster_rcnn, original):
    """New base files name classes as `mmdet.models.detectors.faster_rcnn.FasterRCNN`, and BatchNorm as torch does."""
    config = as_text(mmdet_config(original))
    full = config.replace("type='BN'", "type='torch.nn.BatchNorm2d'").replace("type='nms'", "type='mmcv.ops.nms'")
    full = re.sub(r"type='([A-Z]\w+[a-z]\w*)'", r"type='mmdet.models.some.module.\1'", full)
    assert full.count("mmdet.models") > 10
    assert read(faster_rcnn, full).architecture == read(faster_rcnn, config).architecture


@pytest.mark.parametrize("head", ["FreeAnchorRetinaHead", "PISARetinaHead"])
def test_heads_that_differ_in_training_only_are_taken(retinanet, head):
    config = mmdet_config(ForeignDetector("mmdet", False, backbone="resnet18", fpn=8, classes=2))
    other = changed(config, {"model.bbox_head.type": head})
    assert read(retinanet, other).architecture == read(retinanet, config).architecture


def test_old_names_of_settings_mean_the_same(faster_rcnn, original):
    config = mmdet_config(original)
    proposals = {"nms_pre": 1000, "nms_post": 1000, "max_num": 1000, "nms_thr": 0.7, "min_bbox_size": 0}
    old = changed(config, {"model.test_cfg.rpn": proposals, "model.test_cfg.rcnn.nms": {"type": "nms", "iou_thr": 0.5}})
    assert read(faster_rcnn, old).architecture == read(faster_rcnn, config).architecture


WHOLE = "model = dict(type='FasterRCNN', backbone=dict(type='ResNet'))"


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"cfg": WHOLE[:-1]}, r"meta\.cfg: a configuration that cannot be read \(line 1"),
        ({"config": "model:\n  type: FasterRCNN\n"}, r"meta\.config: a configuration that cannot be read"),
        ({"cfg": WHOLE + "\nmodel['neck'] = dict(type='PAFPN')"}, r"line 2 is no `name = value`.*PAFPN"),
        ({"cfg": WHOLE + "\nfor i in range(3):\n    pass"}, r"line 2 is no `name = value`"),
        ({"cfg": "_base_ = './faster-rcnn_r50_fpn_1x_coco.py'"}, "a configuration without `model`"),
        ({"cfg": "model = build()"}, "a configuration without `model`"),
        ({"cfg": 3}, "expected its text, found 3"),
        ({"cfg": ["model"]}, "expected its text"),
        ("epoch 12", "meta is 'epoch 12', expected a mapping"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_not_taken_for_none(faster_rcnn, meta, said):
    with pytest.raises(CheckpointError, match=said):
        mmdet.to_weights({"state_dict": faster_rcnn, "meta": meta}, "it.pth")


def test_a_configuration_object_of_the_library_is_not_taken_for_none(tmp_path, monkeypatch, faster_rcnn):
    module = types.ModuleType("mmengine_hub")
    module.ConfigDict = type("ConfigDict", (dict,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    meta = {"cfg": module.ConfigDict(model=module.ConfigDict(type="FasterRCNN"))}
    torch.save({"state_dict": faster_rcnn, "meta": meta}, tmp_path / "teacher.pth")
    with pytest.raises(CheckpointError, match=r"meta\.cfg: .*expected its text, found <mmengine_hub\.ConfigDict>"):
        load_weights(tmp_path / "teacher.pth")


@pytest.mark.parametrize("wrap", [lambda config: config, json.dumps, repr], ids=["dict", "JSON", "a printed dict"])
def test_a_configuration_in_another_wrapping(faster_rcnn, original, wrap):
    config = mmdet_config(original)
    content = {"state_dict": faster_rcnn, "meta": {"cfg": wrap(config)}}
    assert mmdet.to_weights(content, "it.pth").architecture == read(faster_rcnn, config).architecture


def test_without_a_configuration_each_assumption_is_a_note(faster_rcnn, retinanet):
    """Thresholds and anchors are for the one who builds the detector to tell: others may be given."""
    deep = ForeignDetector("mmdet", True, fpn=8, head=8, classes=2).weights
    for weights, count in ((faster_rcnn, 2), (retinanet, 2), (deep, 3)):
        found = mmdet.to_weights({"state_dict": weights}, "it.pth")
        assert len(found.assumptions) == count
        assert all(line.startswith("assumed, for the file has no configuration: ") for line in found.assumptions)
        for part in ("RGB pixels, red to blue less [123.675, 116.28, 103.53]", "800 pixels, 1333 at most"):
            assert part in "\n".join(found.assumptions)
        assert not found.stated


def test_a_section_that_the_configuration_does_not_have_is_assumed_aloud(faster_rcnn):
    assumed = read(
        faster_rcnn, "model = dict(type='FasterRCNN', backbone=dict(style='caffe'), neck=dict())"
    ).assumptions
    assert [note.rpartition(".")[2] for note in assumed[:-1]] == [
        "rpn_head",
        "roi_head",
        "test_cfg",
        "data_preprocessor",
    ]
    assert "test_pipeline" in assumed[-1]


def test_names_of_another_number_of_classes_are_left_out_aloud(tmp_path, faster_rcnn):
    weights = load(tmp_path, faster_rcnn, meta={"CLASSES": ("cat", "dog", "cow")})
    assert weights.classes is None
    assert "the file names 3 classes where the head has 2: these names are left out" in weights.assumptions


def test_no_configuration_gives_a_traceback(monkeypatch, faster_rcnn, retinanet):
    """Each is read, or refused with a message; of 1,200, many of both. The weights, all alike, are renamed once."""
    random = Random(0)
    messages = []
    for weights, two_stage in ((faster_rcnn, True), (retinanet, False)):
        weights = {key: value.to("meta") for key, value in weights.items()}
        tables = mmdet.Tables(mmdet.FASTER_RCNN_KEYS if two_stage else mmdet.RETINANET_KEYS, mmdet.DROPPED, [])
        names, _ = renamed(weights, tables, "")
        monkeypatch.setattr(mmdet, "renamed", partial(renamed_before, names))
        whole = ForeignDetector("mmdet", two_stage, backbone="resnet18", fpn=8, head=8, classes=2)
        configs = [mmdet_config(whole, generation) for generation in (2, 3)]
        for _ in range(600):
            config = random.choice(configs)
            config = mutated(config, random, ["model", "model", *({"data", "test_dataloader"} & config.keys())])
            text = as_text(config)
            if random.random() < 0.2:  # cut short, or a letter changed
                at = random.randrange(len(text))
                text = text[:at] + random.choice(["", random.choice("()'=,#\n\\é\0") + text[at + 1 :]])
            messages.append(refusal(weights, text if random.random() < 0.7 else config))
    refused = [message for message in messages if message is not None]
    assert all(message.startswith("it.pth") for message in refused)
    assert 300 < len(refused) < 1100


def renamed_before(names, *_):
    return dict(names), []


def refusal(weights, config):
    content = {"state_dict": weights, "meta": {"cfg": config}}
    try:
        mmdet.to_weights(content, "it.pth")
    except CheckpointError as error:
        return str(error)
    return None


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


def test_mmdetection_1_is_refused(tmp_path, faster_rcnn):
    with pytest.raises(CheckpointError, match=r"mmdetection 1\.2\.0"):
        load(tmp_path, faster_rcnn, meta={"mmdet_version": "1.2.0"})


def test_a_configuration_is_read_and_not_run():
    text = """import os
a = os.system('touch x')
b = dict(c=[1, (2, -3.5)], **{'d': None})
e = {'f': True, **b}
g = h = dict(b, c=1 + 1)
"""
    assert parse(text, "it") == {
        "a": Unread("os.system('touch x')"),
        "b": {"c": [1, [2, -3.5]], "d": None},
        "e": {"f": True, "c": [1, [2, -3.5]], "d": None},
        "g": {"c": Unread("1 + 1"), "d": None},
        "h": {"c": Unread("1 + 1"), "d": None},
    }
