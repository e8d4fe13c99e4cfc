"""mmdetection's Faster R-CNN FPN and RetinaNet, 2.x and 3.x, of `pytorch` and `caffe` style.

What differs from torchvision, and where it is kept:

| mmdetection | here |
|---|---|
| background is the last class; RetinaNet has no column for it | reordered, `conversion.with_background_first` |
| pixels in 0-255, RGB or (caffe style) BGR | first convolution takes RGB; mean and std in `conventions`, over 255 |
| caffe style: a bottleneck strides in its 1x1 convolution | `stride_in_1x1` |
| RoIAlign: half a pixel shifted, adaptive sampling | `roi_align_aligned`, `roi_align_sampling_ratio` |
| anchors not rounded, spaced by 4, 8, 16, … | `rounded_anchors`, `nominal_strides` |
| RetinaNet's P6 from C5, no ReLU before P7 | `p6_from`, `p7_relu` |
| deltas clamped from below too, boxes without area kept, its own rounding between levels | `edge_cases` |

The checkpoint's configuration text says which of these hold. Without one, the library's defaults are taken.
Not kept: images are resized as torchvision does it, whose sides may differ by a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defeat_cli.checkpoints import mmdet_config
from defeat_cli.checkpoints.configuration import read_section
from defeat_cli.checkpoints.conversion import (
    ANCHOR_DELTAS,
    BOX_DELTAS,
    RPN_DELTAS,
    Inputs,
    Tables,
    as_said,
    assumptions,
    fold_bgr,
    fold_deltas,
    guessed_classes,
    pixels_as_said,
    renamed,
    require_anchors,
    require_whole,
    resnet_keys,
    with_background_first,
)
from defeat_cli.checkpoints.mmdet_inputs import read_inputs, says_how_to_normalize
from defeat_cli.checkpoints.mmdet_settings import FasterRCNN, RetinaNet
from defeat_cli.checkpoints.torchvision import resnet_name
from defeat_cli.checkpoints.weights import StateDict, Weights, is_state_dict
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.errors import CheckpointError
from defeat_cli.text import counted

FASTER_RCNN_KEYS = [
    *resnet_keys(r"backbone\."),
    (r"neck\.lateral_convs\.([0-3])\.conv\.(weight|bias)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.([0-3])\.conv\.(weight|bias)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(weight|bias)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(weight|bias)", r"rpn.head.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(weight|bias)", r"roi_heads.box_head.fc6.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(weight|bias)", r"roi_heads.box_head.fc7.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(weight|bias)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(weight|bias)", r"roi_heads.box_predictor.bbox_pred.\1"),
]

RETINANET_KEYS = [
    *resnet_keys(r"backbone\."),
    (r"neck\.lateral_convs\.([0-2])\.conv\.(weight|bias)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.([0-2])\.conv\.(weight|bias)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.3\.conv\.(weight|bias)", r"backbone.fpn.extra_blocks.p6.\1"),
    (r"neck\.fpn_convs\.4\.conv\.(weight|bias)", r"backbone.fpn.extra_blocks.p7.\1"),
    (r"bbox_head\.cls_convs\.([0-3])\.conv\.(weight|bias)", r"head.classification_head.conv.\1.0.\2"),
    (r"bbox_head\.reg_convs\.([0-3])\.conv\.(weight|bias)", r"head.regression_head.conv.\1.0.\2"),
    (r"bbox_head\.retina_cls\.(weight|bias)", r"head.classification_head.cls_logits.\1"),
    (r"bbox_head\.retina_reg\.(weight|bias)", r"head.regression_head.bbox_reg.\1"),
]

DROPPED = [
    (r"ema_.+", "a moving average's copy of the weights"),
    (r".+\.num_batches_tracked", "BatchNorm counters"),
    (r"data_preprocessor\.(mean|std)", "pixel mean and std, kept as conventions"),
]

REFUSED = [
    (r"roi_head\.bbox_head\.\d+\..+", "Cascade R-CNN's several box heads"),
    (r"roi_head\.mask_.+", "a mask head"),
    (r"roi_head\.keypoint_.+", "a keypoint head"),
    (r"roi_head\.bbox_head\.(shared|cls|reg)_convs\..+", "a box head with convolutions"),
    (r"roi_head\..+", "another box head"),
    (r"backbone\..*conv(\d_)?_?offset.*", "deformable convolutions"),
    (r"backbone\..*\.gn\d\..+", "GroupNorm in the backbone"),
    (r"backbone\.stem\..+", "a ResNet with a deep stem (ResNetV1d)"),
    (r"backbone\..+", "a backbone that is no plain ResNet"),
    (r"neck\.(lateral|fpn)_convs\.\d+\.(bn|gn|norm)\..+", "a normalised FPN"),
    (r"neck\..+", "another neck than FPN"),
    (r"rpn_head\..+", "another RPN"),
    (r"bbox_head\..+", "a one-stage head that is not RetinaNet's"),
]


ALL = 2**31 - 1
"""A number of anchors that no level has."""

PIXELS = {
    "pytorch": {
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "bgr_to_rgb": True,
        "pad_size_divisor": 32,
    },
    "caffe": {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "pad_size_divisor": 32},
}
"""What each style of backbone is usually fed."""

BOX_TEST = {"score_thr": 0.05, "nms": {"iou_threshold": 0.5}, "max_per_img": 100}
PROPOSAL_TEST = {"nms_pre": 1000, "max_per_img": 1000, "nms": {"iou_threshold": 0.7}, "min_bbox_size": 0}

USUAL_TWO_STAGE = {
    "backbone": {"style": "pytorch"},
    "neck": {},
    "rpn_head": {"anchor_generator": {"scales": [8], "ratios": [0.5, 1.0, 2.0]}},
    "roi_head": {},
    "test_cfg": {"rpn": PROPOSAL_TEST, "rcnn": BOX_TEST},
}
USUAL_ONE_STAGE = {
    "backbone": {"style": "pytorch"},
    "neck": {"add_extra_convs": "on_input"},
    "bbox_head": {},
    "test_cfg": {**BOX_TEST, "nms_pre": 1000, "min_bbox_size": 0},
}
"""Sections that are assumed where a file has none of that name: those of the detectors that mmdetection publishes."""


def matches(content: Any) -> bool:
    state_dict = _unwrapped(content)
    return state_dict is not None and any(
        key.startswith(("neck.", "roi_head.bbox_head.", "rpn_head.rpn_", "bbox_head.")) for key in state_dict
    )


def to_weights(content: Any, origin: str, architecture: Architecture | None = None) -> Weights:
    """The detector in an mmdetection checkpoint.

    Args:
        architecture: used only where the file has no configuration: `conventions.channels` then says that image mean
            and std, their order and the stride are as `conventions` has them, and `stride_in_1x1` alone caffe style.

    Raises:
        CheckpointError: names what of it torchvision's detectors do not have.
    """
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    version = str(meta.get("mmdet_version", ""))
    state_dict = _unwrapped(content)
    if version.startswith(("0.", "1.")) or "bbox_head.fc_cls.weight" in state_dict:
        raise CheckpointError(
            f"{origin}: from mmdetection {version or '1.x'}, which counts pixels and classes otherwise. "
            "Those of 2.x and 3.x are read"
        )
    two_stage = any(key.startswith(("roi_head.", "rpn_head.")) for key in state_dict)
    keys = FASTER_RCNN_KEYS if two_stage else RETINANET_KEYS
    converted, dropped = renamed(state_dict, Tables(keys, DROPPED, REFUSED), origin)
    require_whole(converted, two_stage, origin)
    config = mmdet_config.found(content, origin)
    said = architecture.conventions if architecture is not None else Conventions()
    completed, missing = _completed(config or {}, converted, two_stage, said)
    settings, inputs = settings_of(completed, two_stage, origin)
    inputs = pixels_as_said(inputs, said, origin, known="data_preprocessor" not in missing)
    body = {key.removeprefix("backbone.body."): value for key, value in converted.items() if "backbone.body." in key}
    backbone = resnet_name(body, origin)
    built = as_said(_architecture(settings, inputs, converted, backbone, origin), said)
    _fold_coders(settings, converted)
    classes = with_background_first(converted, origin)
    if not inputs.is_rgb:
        fold_bgr(converted)
    names, naming = _class_names(meta, classes)
    short_side, long_side = sorted(inputs.scale or (800, 1333))
    notes = [
        f"an mmdetection {version or '2.x or 3.x'} checkpoint: {built.detector} on {backbone}, "
        f"{counted(classes, 'class')}",
        "the background was the last class and is now the first"
        if two_stage
        else "a column for the background was added",
        "takes RGB as it was trained" if inputs.is_rgb else "trained on BGR: its first convolution now takes RGB",
        *dropped,
    ]
    if config is None:
        assumed = assumptions(built, inputs.is_rgb, short_side, long_side, "the file has no configuration")
    else:
        why = "assumed, for the configuration has none:"
        assumed = [f"{why} mmdetection's usual model.{name}" for name in missing]
        assumed += [f"{why} a test_pipeline for images of 800 pixels, 1333 at most"] if inputs.scale is None else []
    return Weights(
        "mmdet",
        converted,
        built,
        classes,
        names,
        short_side,
        long_side,
        notes,
        [*naming, *assumed],
        stated="test_cfg" not in missing,
    )


def _unwrapped(content: Any) -> StateDict | None:
    inner = content.get("state_dict") if isinstance(content, Mapping) and "state_dict" in content else content
    if not is_state_dict(inner):
        return None
    return {key.removeprefix("module."): value for key, value in inner.items()}


def _class_names(meta: Mapping[str, Any], classes: int) -> tuple[list[str] | None, list[str]]:
    """Names from the file (3.x: `dataset_meta`, 2.x: `CLASSES`), else COCO's where there are 80; and notes on them."""
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else {}
    names = dataset.get("classes") or dataset.get("CLASSES") or meta.get("CLASSES")
    names = [names] if isinstance(names, str) else names  # 2.x keeps a single class as a bare string
    notes = []
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        if len(names) == classes:
            return list(names), []
        notes = [
            f"the file names {counted(len(names), 'class')} where the head has {classes}: these names are left out"
        ]
    guess, guessing = guessed_classes(classes)
    return guess, notes + guessing


def _completed(
    config: dict[str, Any], converted: StateDict, two_stage: bool, said: Conventions
) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the usual sections in place of those that it does not have, and the names of these."""
    usual = {**(USUAL_TWO_STAGE if two_stage else USUAL_ONE_STAGE)}
    p6 = converted.get("backbone.fpn.extra_blocks.p6.weight")
    if p6 is not None and p6.shape[0] == p6.shape[1]:
        usual["neck"] = {"add_extra_convs": "on_output"}
    if said.stride_in_1x1:
        usual["backbone"] = {"style": "caffe"}
    model = config.get("model", {})
    backbone = model.get("backbone") or usual["backbone"]
    if "model" not in config or not says_how_to_normalize(config):
        caffe = isinstance(backbone, Mapping) and backbone.get("style") == "caffe"
        usual["data_preprocessor"] = PIXELS["caffe" if caffe else "pytorch"]
    missing = [name for name in usual if model.get(name) is None]
    return {**config, "model": {**model, **{name: usual[name] for name in missing}}}, missing


def settings_of(config: dict[str, Any], two_stage: bool, origin: str) -> tuple[FasterRCNN | RetinaNet, Inputs]:
    """What a configuration says.

    Raises:
        CheckpointError: names everything that is not understood.
    """
    kind = FasterRCNN if two_stage else RetinaNet
    read: list[Any] = []
    problems = []
    for section in (lambda: read_section(kind, config["model"], "model"), lambda: read_inputs(config)):
        try:
            read.append(section())
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n  ".join([f"{origin}: a detector that cannot be represented here:", *problems]))
    return tuple(read)


def _architecture(
    settings: FasterRCNN | RetinaNet, inputs: Inputs, converted: StateDict, backbone: str, origin: str
) -> Architecture:
    two_stage = isinstance(settings, FasterRCNN)
    anchors = (settings.rpn_head if two_stage else settings.bbox_head).anchor_generator
    boxes = settings.test_cfg.rcnn if two_stage else settings.test_cfg
    require_anchors(converted, anchors.sizes, anchors.ratios, origin)
    nms = boxes.nms
    conventions = {
        **inputs.conventions,
        "stride_in_1x1": settings.backbone.style == "caffe",
        "batch_norm_eps": settings.backbone.norm_cfg.eps,
        "edge_cases": "mmdetection",
        "rounded_anchors": False,
        "anchor_order": "ratios-first" if anchors.scale_major else "sizes-first",
        "nominal_strides": True,
        "suppression": "hard" if nms.type == "nms" else nms.method,
        "suppression_sigma": nms.sigma,
        "suppression_least_score": nms.min_score,
        "suppression_across_classes": nms.class_agnostic,
    }
    shared = {
        "backbone": backbone,
        "fpn_channels": len(converted["backbone.fpn.layer_blocks.0.0.bias"]),
        "anchor_sizes": anchors.sizes,
        "anchor_ratios": anchors.ratios,
        "score_threshold": boxes.score_thr,
        "nms_threshold": nms.iou_threshold,
        "detections_per_image": boxes.max_per_img,
    }
    if two_stage:
        head, proposals = settings.roi_head, settings.test_cfg.rpn
        pooling = head.bbox_roi_extractor.roi_layer
        conventions |= {
            "roi_align_aligned": pooling.aligned,
            "roi_align_sampling_ratio": pooling.sampling_ratio,
            "clip_proposals": settings.rpn_head.bbox_coder.clip_border,
            "clip_detections": head.bbox_head.bbox_coder.clip_border,
            "smallest_box": proposals.min_bbox_size,
        }
        return Architecture(
            detector="faster_rcnn",
            head_channels=len(converted["roi_heads.box_head.fc7.bias"]),
            proposals=proposals.max_per_img,
            proposals_before_nms=proposals.nms_pre if proposals.nms_pre > 0 else ALL,
            proposal_nms_threshold=proposals.nms.iou_threshold,
            conventions=Conventions(**conventions),
            **shared,
        )
    conventions |= {
        "p6_from": "p5" if settings.neck.add_extra_convs == "on_output" else "c5",
        "p7_relu": settings.neck.relu_before_extra_convs,
        "clip_detections": settings.bbox_head.bbox_coder.clip_border,
        "smallest_box": settings.test_cfg.min_bbox_size,
    }
    return Architecture(
        detector="retinanet",
        candidates_per_level=settings.test_cfg.nms_pre,
        conventions=Conventions(**conventions),
        **shared,
    )


def _fold_coders(settings: FasterRCNN | RetinaNet, converted: StateDict) -> None:
    """Let the layers that give box deltas give those of torchvision's coders."""
    coders = (
        {ANCHOR_DELTAS: settings.bbox_head.bbox_coder}
        if isinstance(settings, RetinaNet)
        else {
            RPN_DELTAS: settings.rpn_head.bbox_coder,
            BOX_DELTAS: settings.roi_head.bbox_head.bbox_coder,
        }
    )
    for layer, coder in coders.items():
        fold_deltas(converted, layer, coder.target_means, coder.target_stds)
