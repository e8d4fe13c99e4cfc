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

import re
from collections.abc import Mapping
from typing import Any

from defeat_cli.checkpoints import mmdet_config
from defeat_cli.checkpoints.conversion import (
    Tables,
    fold_bgr,
    renamed,
    require_whole,
    resnet_keys,
    unit_range,
    with_background_first,
)
from defeat_cli.checkpoints.torchvision import coco_classes, resnet_name
from defeat_cli.checkpoints.weights import StateDict, Weights, is_state_dict
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.errors import CheckpointError

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

SETTINGS = {
    "model.backbone.type": ("ResNet", "ResNeXt"),
    "model.backbone.norm_cfg.type": ("BN", "SyncBN"),
    "model.backbone.avg_down": (False,),
    "model.backbone.strides": ([1, 2, 2, 2],),
    "model.backbone.dilations": ([1, 1, 1, 1],),
    "model.neck.type": ("FPN",),
}
TWO_STAGE_SETTINGS = {
    **SETTINGS,
    "model.type": ("FasterRCNN",),
    "model.neck.add_extra_convs": (False,),
    "model.rpn_head.anchor_generator.strides": ([4, 8, 16, 32, 64],),
    "model.rpn_head.anchor_generator.center_offset": (0.0,),
    "model.rpn_head.anchor_generator.scale_major": (True,),
    "model.roi_head.bbox_roi_extractor.finest_scale": (56,),
    "model.roi_head.bbox_head.type": ("Shared2FCBBoxHead", "ConvFCBBoxHead"),
    "model.roi_head.bbox_head.loss_cls.use_sigmoid": (False,),
    "model.roi_head.bbox_head.bbox_coder.type": ("DeltaXYWHBBoxCoder",),
    "model.roi_head.bbox_head.bbox_coder.target_stds": ([0.1, 0.1, 0.2, 0.2],),
}
ONE_STAGE_SETTINGS = {
    **SETTINGS,
    "model.type": ("RetinaNet",),
    "model.neck.add_extra_convs": ("on_input", "on_output", True),
    "model.bbox_head.anchor_generator.strides": ([8, 16, 32, 64, 128],),
    "model.bbox_head.anchor_generator.center_offset": (0.0,),
    "model.bbox_head.anchor_generator.scale_major": (True,),
    "model.bbox_head.type": ("RetinaHead",),
    "model.bbox_head.loss_cls.use_sigmoid": (True,),
    "model.bbox_head.bbox_coder.type": ("DeltaXYWHBBoxCoder",),
    "model.bbox_head.bbox_coder.target_stds": ([1.0, 1.0, 1.0, 1.0],),
}
"""Settings that neither keys nor shapes show, with the values that can be represented, the library's default first."""

MEAN_RGB, STD_RGB = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
MEAN_BGR, STD_CAFFE = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]


def matches(content: Any) -> bool:
    state_dict = _unwrapped(content)
    return state_dict is not None and any(
        key.startswith(("neck.", "roi_head.bbox_head.", "rpn_head.rpn_", "bbox_head.")) for key in state_dict
    )


def to_weights(content: Any, origin: str, architecture: Architecture | None = None) -> Weights:
    """The detector in an mmdetection checkpoint.

    Args:
        architecture: used only where the file has no configuration: `conventions.stride_in_1x1` then says caffe style.

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
    text = str(meta.get("cfg") or meta.get("config") or "")
    config = mmdet_config.parse(text)
    two_stage = any(key.startswith(("roi_head.", "rpn_head.")) for key in state_dict)
    _refuse_settings(config, two_stage, origin)
    keys = FASTER_RCNN_KEYS if two_stage else RETINANET_KEYS
    converted, dropped = renamed(state_dict, Tables(keys, DROPPED, REFUSED), origin)
    require_whole(converted, two_stage, origin)
    classes = with_background_first(converted, origin)
    body = {key.removeprefix("backbone.body."): value for key, value in converted.items() if "backbone.body." in key}
    backbone = resnet_name(body, origin)
    caffe = re.search(r"""\bstyle['"]?\s*[=:]\s*['"]caffe['"]""", text) is not None
    if not text and architecture is not None:
        caffe = architecture.conventions.stride_in_1x1
    mean, std, is_rgb = _normalization(config, caffe)
    if not is_rgb:
        fold_bgr(converted)
        mean, std = mean[::-1], std[::-1]
    conventions = _conventions(config, converted, mean, std, caffe)
    built = _architecture(config, converted, two_stage, backbone, conventions, origin)
    names = _class_names(meta, classes)
    source = "its configuration" if "model" in config else "the library's defaults, for the file has no configuration"
    notes = [
        f"an mmdetection {version or '2.x or 3.x'} checkpoint: {built.detector} on {backbone}, {classes} classes",
        f"conventions from {source}: {'caffe' if caffe else 'pytorch'} style",
        "the background was the last class and is now the first"
        if two_stage
        else "a column for the background was added",
        "takes RGB as it was trained" if is_rgb else "trained on BGR: its first convolution now takes RGB",
        *dropped,
    ]
    short_side, long_side = _sides(config)
    return Weights("mmdet", converted, built, classes, names, short_side, long_side, notes)


def _unwrapped(content: Any) -> StateDict | None:
    inner = content.get("state_dict") if isinstance(content, Mapping) and "state_dict" in content else content
    if not is_state_dict(inner):
        return None
    return {key.removeprefix("module."): value for key, value in inner.items()}


def _class_names(meta: Mapping[str, Any], classes: int) -> list[str] | None:
    """Names from the file (3.x: `dataset_meta`, 2.x: `CLASSES`), else COCO's where there are 80."""
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else {}
    names = dataset.get("classes") or dataset.get("CLASSES") or meta.get("CLASSES")
    names = [names] if isinstance(names, str) else names  # 2.x keeps a single class as a bare string
    if isinstance(names, list | tuple) and len(names) == classes and all(isinstance(name, str) for name in names):
        return list(names)
    return coco_classes(classes) if classes == 80 else None


def _refuse_settings(config: dict[str, Any], two_stage: bool, origin: str) -> None:
    """Refuse what the configuration asks for, keys and shapes do not show, and torchvision's detectors do not do."""
    problems = []
    for key, allowed in (TWO_STAGE_SETTINGS if two_stage else ONE_STAGE_SETTINGS).items():
        value = mmdet_config.get(config, key, allowed[0])
        if key.endswith(".type"):
            value = str(value).rpartition(".")[2]  # a class may be named with its package
        if value not in allowed:
            problems.append(f"{key} = {value!r} (can be {' or '.join(map(repr, allowed))})")
    if problems:
        raise CheckpointError("\n  ".join([f"{origin}: a detector that cannot be represented here:", *problems]))


def _normalization(config: dict[str, Any], caffe: bool) -> tuple[list[float], list[float], bool]:
    """Pixel mean and std in the detector's channel order, and whether that is RGB: images are read as BGR."""
    settings = (
        mmdet_config.get(config, "model.data_preprocessor")  # 3.x
        or mmdet_config.get(config, "data_preprocessor")
        or mmdet_config.get(config, "img_norm_cfg")  # 2.x
        or {}
    )
    mean = settings.get("mean") or (MEAN_BGR if caffe else MEAN_RGB)
    std = settings.get("std") or (STD_CAFFE if caffe else STD_RGB)
    swapped = any(settings.get(key) for key in ("bgr_to_rgb", "rgb_to_bgr", "to_rgb"))
    return list(mean), list(std), swapped if settings.get("mean") else not caffe


def _conventions(
    config: dict[str, Any], converted: StateDict, mean: list[float], std: list[float], caffe: bool
) -> Conventions:
    get = mmdet_config.get
    pooling = get(config, "model.roi_head.bbox_roi_extractor.roi_layer", {})
    p6 = converted.get("backbone.fpn.extra_blocks.p6.weight")
    # What P6 is computed from shows in its channels, but for a C5 that has as many as the FPN.
    on_input = get(config, "model.neck.add_extra_convs") == "on_input"
    from_c5 = on_input or (p6 is not None and p6.shape[1] != p6.shape[0])
    return Conventions(
        image_mean=unit_range(mean),
        image_std=unit_range(std),
        stride_in_1x1=caffe,
        batch_norm_eps=1e-5,
        roi_align_aligned=pooling.get("aligned", True),
        roi_align_sampling_ratio=pooling.get("sampling_ratio", pooling.get("sample_num", 0)),
        edge_cases="mmdetection",
        rounded_anchors=False,
        anchor_order="ratios-first",
        nominal_strides=True,
        p6_from="c5" if from_c5 else "p5",
        p7_relu=bool(get(config, "model.neck.relu_before_extra_convs", False)),
    )


def _architecture(
    config: dict[str, Any],
    converted: StateDict,
    two_stage: bool,
    backbone: str,
    conventions: Conventions,
    origin: str,
) -> Architecture:
    get = mmdet_config.get
    test = get(config, "model.test_cfg") or get(config, "test_cfg") or {}
    boxes = get(test, "rcnn", {}) if two_stage else test
    sizes, ratios = _anchors(config, two_stage)
    fpn_channels = len(converted["backbone.fpn.layer_blocks.0.0.bias"])
    found = len(converted["rpn.head.cls_logits.bias" if two_stage else "head.regression_head.bbox_reg.bias"])
    anchors = found if two_stage else found // 4
    if anchors != len(sizes[0]) * len(ratios):
        raise CheckpointError(f"{origin}: {anchors} anchors a cell, where {len(sizes[0]) * len(ratios)} are configured")
    shared = {
        "backbone": backbone,
        "fpn_channels": fpn_channels,
        "anchor_sizes": sizes,
        "anchor_ratios": ratios,
        "score_threshold": get(boxes, "score_thr", 0.05),
        "nms_threshold": get(boxes, "nms.iou_threshold", get(boxes, "nms.iou_thr", 0.5)),
        "detections_per_image": get(boxes, "max_per_img", 100),
        "conventions": conventions,
    }
    if two_stage:
        proposals = get(test, "rpn.max_per_img", get(test, "rpn.max_num", 1000))
        head_channels = len(converted["roi_heads.box_head.fc7.bias"])
        return Architecture(detector="faster_rcnn", head_channels=head_channels, proposals=proposals, **shared)
    return Architecture(detector="retinanet", **shared)


def _anchors(config: dict[str, Any], two_stage: bool) -> tuple[list[list[float]], list[float]]:
    """Anchor sizes of each level, and ratios. A size is the level's base, which is its stride, times a scale."""
    path = "model.rpn_head.anchor_generator" if two_stage else "model.bbox_head.anchor_generator"
    settings = mmdet_config.get(config, path, {})
    bases = settings.get("base_sizes") or ([4, 8, 16, 32, 64] if two_stage else [8, 16, 32, 64, 128])
    scales = settings.get("scales")
    if scales is None and (two_stage or settings.get("octave_base_scale") is None):
        scales = [8] if two_stage else [4 * 2 ** (i / 3) for i in range(3)]
    elif scales is None:
        count = settings["scales_per_octave"]
        scales = [settings["octave_base_scale"] * 2 ** (i / count) for i in range(count)]
    ratios = [float(ratio) for ratio in settings.get("ratios") or [0.5, 1.0, 2.0]]
    return [[float(base * scale) for scale in scales] for base in bases], ratios


def _sides(config: dict[str, Any]) -> tuple[int, int]:
    """Short and long side of images at test time; 800 and 1333 where the configuration does not say."""
    pipeline = config.get("test_pipeline")
    scale = mmdet_config.find(pipeline, "img_scale") or mmdet_config.find(pipeline, "scale")
    if isinstance(scale, list) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
        return min(scale), max(scale)
    return 800, 1333
