"""detectron2's Faster R-CNN FPN and RetinaNet: `.pth` checkpoints and the model zoo's `.pkl` files.

What differs from torchvision, and where it is kept:

| detectron2 | here |
|---|---|
| background is the last class; RetinaNet has no column for it | reordered, `conversion.with_background_first` |
| BGR pixels in 0-255, MSRA ResNets with std 1 | first convolution takes RGB; mean and std in `conventions`, over 255 |
| MSRA ResNets stride in a bottleneck's 1x1 convolution | `stride_in_1x1` |
| FrozenBatchNorm with epsilon 1e-5 | `batch_norm_eps` |
| ROIAlignV2: half a pixel shifted, adaptive sampling | `roi_align_aligned`, `roi_align_sampling_ratio` |
| anchors not rounded, sizes first, spaced by 4, 8, 16, … | `rounded_anchors`, `anchor_order`, `nominal_strides` |
| RetinaNet's P6 from C5, a ReLU before P7 | `p6_from`, `p7_relu` |
| RetinaNet clips boxes after suppression | `clip_after_nms` |
| boxes without area dropped last, its own rounding between levels | `edge_cases` |

Not kept: images are resized as torchvision does it, without antialias, and sides may differ by a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defeat_cli.checkpoints import detectron2_config
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
    says_other_pixels,
    with_background_first,
)
from defeat_cli.checkpoints.detectron2_config import OneStageConfig, TwoStage, TwoStageConfig
from defeat_cli.checkpoints.torchvision import resnet_name
from defeat_cli.checkpoints.weights import StateDict, Weights, is_state_dict
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.errors import CheckpointError
from defeat_cli.text import counted

_STATISTICS = "(weight|bias|running_mean|running_var)"
_BODY = "backbone.body"

BACKBONE_KEYS = [
    (r"backbone\.bottom_up\.stem\.conv1\.weight", f"{_BODY}.conv1.weight"),
    (rf"backbone\.bottom_up\.stem\.conv1\.norm\.{_STATISTICS}", rf"{_BODY}.bn1.\1"),
]
for _stage in (2, 3, 4, 5):
    _block = rf"backbone\.bottom_up\.res{_stage}\.(\d+)"
    _layer = rf"{_BODY}.layer{_stage - 1}.\1"
    BACKBONE_KEYS += [
        (rf"{_block}\.conv([123])\.weight", rf"{_layer}.conv\2.weight"),
        (rf"{_block}\.conv([123])\.norm\.{_STATISTICS}", rf"{_layer}.bn\2.\3"),
        (rf"{_block}\.shortcut\.weight", rf"{_layer}.downsample.0.weight"),
        (rf"{_block}\.shortcut\.norm\.{_STATISTICS}", rf"{_layer}.downsample.1.\2"),
    ]

FASTER_RCNN_KEYS = [
    *BACKBONE_KEYS,
    *[(rf"backbone\.fpn_lateral{i + 2}\.(weight|bias)", rf"backbone.fpn.inner_blocks.{i}.0.\1") for i in range(4)],
    *[(rf"backbone\.fpn_output{i + 2}\.(weight|bias)", rf"backbone.fpn.layer_blocks.{i}.0.\1") for i in range(4)],
    (r"proposal_generator\.rpn_head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(weight|bias)", r"rpn.head.cls_logits.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(weight|bias)", r"rpn.head.bbox_pred.\1"),
    (r"roi_heads\.box_head\.fc1\.(weight|bias)", r"roi_heads.box_head.fc6.\1"),
    (r"roi_heads\.box_head\.fc2\.(weight|bias)", r"roi_heads.box_head.fc7.\1"),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias)", r"roi_heads.box_predictor.\1.\2"),
]

RETINANET_KEYS = [
    *BACKBONE_KEYS,
    *[(rf"backbone\.fpn_lateral{i + 3}\.(weight|bias)", rf"backbone.fpn.inner_blocks.{i}.0.\1") for i in range(3)],
    *[(rf"backbone\.fpn_output{i + 3}\.(weight|bias)", rf"backbone.fpn.layer_blocks.{i}.0.\1") for i in range(3)],
    (r"backbone\.top_block\.(p6|p7)\.(weight|bias)", r"backbone.fpn.extra_blocks.\1.\2"),
    *[(rf"head\.cls_subnet\.{2 * i}\.(weight|bias)", rf"head.classification_head.conv.{i}.0.\1") for i in range(4)],
    *[(rf"head\.bbox_subnet\.{2 * i}\.(weight|bias)", rf"head.regression_head.conv.{i}.0.\1") for i in range(4)],
    (r"head\.cls_score\.(weight|bias)", r"head.classification_head.cls_logits.\1"),
    (r"head\.bbox_pred\.(weight|bias)", r"head.regression_head.bbox_reg.\1"),
]

DROPPED = [
    (r".+\.num_batches_tracked", "BatchNorm counters"),
    (r"pixel_(mean|std)", "pixel mean and std, kept as conventions"),
    (r"(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+", "anchors, kept as sizes and ratios"),
]

REFUSED = [
    (r"roi_heads\.(box_head|box_predictor)\.\d+\..+", "Cascade R-CNN's several box heads"),
    (r"roi_heads\.mask_.+", "a mask head"),
    (r"roi_heads\.keypoint_.+", "a keypoint head"),
    (r"roi_heads\.box_head\.conv.+", "a box head with convolutions"),
    (r"roi_heads\.res5\..+", "a C4 box head"),
    (r"backbone\.bottom_up\..+\.conv2_offset\..+", "deformable convolutions"),
    (r"backbone\.fpn_.+\.norm\..+", "a normalised FPN"),
    (r"backbone\.(stem|res\d)\..+", "a backbone without FPN (C4 or DC5)"),
    (r"backbone\.bottom_up\..+", "a backbone that is no plain ResNet"),
    (r"sem_seg_head\..+", "a segmentation head"),
    (r"proposal_generator\..+", "another RPN"),
    (r"head\..+", "another one-stage head"),
]

ASSUMED_TWO_STAGE = {
    "META_ARCHITECTURE": "GeneralizedRCNN",
    "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
    "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"]},
    "ANCHOR_GENERATOR": {"SIZES": [[32.0], [64.0], [128.0], [256.0], [512.0]]},
    "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "PRE_NMS_TOPK_TEST": 1000},
    "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
    "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
}
"""What is taken for the configuration where there is none: the model zoo's detectors with FPN."""

ASSUMED_ONE_STAGE = {
    "META_ARCHITECTURE": "RetinaNet",
    "BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone"},
    "FPN": {"IN_FEATURES": ["res3", "res4", "res5"]},
    "ANCHOR_GENERATOR": {
        "SIZES": [[side * 2 ** (i / 3) for i in range(3)] for side in (32.0, 64.0, 128.0, 256.0, 512.0)]
    },
}

ASSUMED_RESNEXT = {"PIXEL_STD": [57.375, 57.12, 58.395], "RESNETS": {"STRIDE_IN_1X1": False}}
"""The model zoo's ResNeXt is no model of MSRA's."""


def matches(content: Any) -> bool:
    if isinstance(content, Mapping) and "blobs" in content:
        return True  # Detectron 1, to be refused by name
    state_dict = _unwrapped(content)
    prefixes = ("backbone.bottom_up.", "backbone.res2.", "proposal_generator.")
    return state_dict is not None and any(key.startswith(prefixes) for key in state_dict)


def to_weights(content: Any, origin: str, architecture: Architecture | None = None) -> Weights:
    """The detector in a detectron2 checkpoint, with the settings of the `config.yaml` beside it.

    Args:
        architecture: used only where there is no such file: `conventions.channels` then says that image mean and std,
            their order and the stride are as `conventions` has them.

    Raises:
        CheckpointError: names what of it torchvision's detectors do not have.
    """
    state_dict = _unwrapped(content)
    if state_dict is None:
        raise CheckpointError(f"{origin}: a Detectron 1 (Caffe2) file: only detectron2's are read")
    two_stage = any(key.startswith(("roi_heads.", "proposal_generator.")) for key in state_dict)
    keys = FASTER_RCNN_KEYS if two_stage else RETINANET_KEYS
    converted, dropped = renamed(state_dict, Tables(keys, DROPPED, REFUSED), origin)
    require_whole(converted, two_stage, origin)
    body = {key.removeprefix(f"{_BODY}."): value for key, value in converted.items() if key.startswith(_BODY)}
    backbone = resnet_name(body, origin)
    said = architecture.conventions if architecture is not None else Conventions()
    beside = detectron2_config.find(Path(origin))
    known = beside is not None and beside[1] is not None
    settings = (
        detectron2_config.read(beside[1], two_stage, str(beside[0]))
        if known
        else _assumed(backbone, two_stage, said, origin)
    )
    inputs = pixels_as_said(_inputs(settings, state_dict, known), said, origin, known=known)
    anchors = settings.MODEL.ANCHOR_GENERATOR
    sizes, ratios = _anchors_in(state_dict, origin) or (anchors.sizes, anchors.ASPECT_RATIOS[0])
    require_anchors(converted, sizes, ratios, origin)
    built = as_said(_architecture(settings, inputs, converted, backbone, sizes, ratios), said)
    _fold_coders(settings, converted)
    classes = with_background_first(converted, origin)
    if not inputs.is_rgb:
        fold_bgr(converted)
    names, assumed = guessed_classes(classes)
    short_side, long_side = settings.INPUT.MIN_SIZE_TEST, settings.INPUT.MAX_SIZE_TEST
    notes = [
        f"a detectron2 checkpoint: {built.detector} on {backbone}, {counted(classes, 'class')}",
        "the background was the last class and is now the first"
        if two_stage
        else "a column for the background was added",
        "takes RGB as it was trained" if inputs.is_rgb else "trained on BGR: its first convolution now takes RGB",
        f"a bottleneck strides in its {'1x1' if built.conventions.stride_in_1x1 else '3x3'} convolution",
        *dropped,
    ]
    if known:
        notes.append(f"its settings are those of {beside[0]}")
    else:
        if beside is not None:
            assumed.append(f"{beside[0]} is no configuration of detectron2's, and was not read")
        why = f"there is no {detectron2_config.FILE} of detectron2's beside the file"
        assumed += assumptions(built, inputs.is_rgb, short_side, long_side, why)
    return Weights("detectron2", converted, built, classes, names, short_side, long_side, notes, assumed, stated=known)


def _assumed(backbone: str, two_stage: bool, said: Conventions, origin: str) -> TwoStageConfig | OneStageConfig:
    """The model zoo's settings; a stride is the caller's where the caller says what the network takes."""
    model = {**(ASSUMED_TWO_STAGE if two_stage else ASSUMED_ONE_STAGE)}
    if backbone.startswith("resnext"):
        model |= ASSUMED_RESNEXT
    if says_other_pixels(said, is_rgb=False):
        model["RESNETS"] = {"STRIDE_IN_1X1": said.stride_in_1x1}
    return detectron2_config.read({"MODEL": model}, two_stage, origin)


def _inputs(settings: TwoStageConfig | OneStageConfig, state_dict: StateDict, known: bool) -> Inputs:
    """Pixel mean and std are the file's, where it has them. ImageNet is brightest in red, which tells RGB from BGR."""
    mean, std = (
        state_dict[name].flatten().tolist() if name in state_dict else configured
        for name, configured in (("pixel_mean", settings.MODEL.PIXEL_MEAN), ("pixel_std", settings.MODEL.PIXEL_STD))
    )
    is_rgb = settings.INPUT.FORMAT == "RGB" if known else mean[0] > mean[2]
    return Inputs(mean, std, is_rgb, (settings.INPUT.MAX_SIZE_TEST, settings.INPUT.MIN_SIZE_TEST))


def _architecture(
    settings: TwoStageConfig | OneStageConfig,
    inputs: Inputs,
    converted: StateDict,
    backbone: str,
    sizes: list[list[float]],
    ratios: list[float],
) -> Architecture:
    model = settings.MODEL
    conventions = {
        **inputs.conventions,
        "stride_in_1x1": model.RESNETS.STRIDE_IN_1X1 and backbone not in ("resnet18", "resnet34"),
        "batch_norm_eps": 1e-5,
        "edge_cases": "detectron2",
        "rounded_anchors": False,
        "anchor_order": "sizes-first",
        "nominal_strides": True,
    }
    shared = {
        "backbone": backbone,
        "fpn_channels": len(converted["backbone.fpn.layer_blocks.0.0.bias"]),
        "anchor_sizes": sizes,
        "anchor_ratios": ratios,
        "detections_per_image": settings.TEST.DETECTIONS_PER_IMAGE,
    }
    if isinstance(model, TwoStage):
        return Architecture(
            detector="faster_rcnn",
            head_channels=len(converted["roi_heads.box_head.fc7.bias"]),
            proposals=model.RPN.POST_NMS_TOPK_TEST,
            proposals_before_nms=model.RPN.PRE_NMS_TOPK_TEST,
            proposal_nms_threshold=model.RPN.NMS_THRESH,
            score_threshold=model.ROI_HEADS.SCORE_THRESH_TEST,
            nms_threshold=model.ROI_HEADS.NMS_THRESH_TEST,
            conventions=Conventions(
                **conventions,
                roi_align_aligned=model.ROI_BOX_HEAD.POOLER_TYPE == "ROIAlignV2",
                roi_align_sampling_ratio=model.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO,
                smallest_box=model.PROPOSAL_GENERATOR.MIN_SIZE,
            ),
            **shared,
        )
    p6 = converted["backbone.fpn.extra_blocks.p6.weight"]
    return Architecture(
        detector="retinanet",
        candidates_per_level=model.RETINANET.TOPK_CANDIDATES_TEST,
        score_threshold=model.RETINANET.SCORE_THRESH_TEST,
        nms_threshold=model.RETINANET.NMS_THRESH_TEST,
        conventions=Conventions(
            **conventions,
            p6_from="c5" if p6.shape[1] != p6.shape[0] else "p5",
            p7_relu=True,
            clip_after_nms=True,
        ),
        **shared,
    )


def _fold_coders(settings: TwoStageConfig | OneStageConfig, converted: StateDict) -> None:
    """Let the layers that give box deltas give those of torchvision's coders."""
    model = settings.MODEL
    weights = (
        {RPN_DELTAS: model.RPN.BBOX_REG_WEIGHTS, BOX_DELTAS: model.ROI_BOX_HEAD.BBOX_REG_WEIGHTS}
        if isinstance(model, TwoStage)
        else {ANCHOR_DELTAS: model.RETINANET.BBOX_REG_WEIGHTS}
    )
    for layer, of_layer in weights.items():
        fold_deltas(converted, layer, [0.0] * 4, [1 / weight for weight in of_layer])


def _unwrapped(content: Any) -> StateDict | None:
    inner = content.get("model") if isinstance(content, Mapping) and "model" in content else content
    if not is_state_dict(inner):
        return None
    return {key.removeprefix("module."): value for key, value in inner.items()}


def _anchors_in(state_dict: StateDict, origin: str) -> tuple[list[list[float]], list[float]] | None:
    """Anchor sizes of each level, and ratios, of a file that has its anchors in it."""
    cells = {key: value for key, value in state_dict.items() if ".cell_anchors." in f".{key}"}
    if not cells:
        return None
    ordered = sorted(cells.items(), key=lambda item: int(item[0].rpartition(".")[2]))
    levels = [_sizes_and_ratios(value, f"{origin}: {key}") for key, value in ordered]
    if any(ratios != levels[0][1] for _, ratios in levels):
        raise CheckpointError(f"{origin}: anchors of other ratios on some levels than on the first")
    return [sizes for sizes, _ in levels], levels[0][1]


def _sizes_and_ratios(cell: Tensor, origin: str) -> tuple[list[float], list[float]]:
    """Sizes and ratios that the anchors of one cell, [A, 4], are made of: sizes first, each in all ratios."""
    x1, y1, x2, y2 = cell.double().unbind(1)
    sizes, ratios = ((x2 - x1) * (y2 - y1)).sqrt(), (y2 - y1) / (x2 - x1)
    same_size = (sizes / sizes[0] - 1).abs() < 1e-3
    per_size = len(sizes) if same_size.all() else int(same_size.int().argmin())
    sizes, ratios = sizes[::per_size], ratios[:per_size]
    heights, widths = torch.outer(sizes, ratios.sqrt()).flatten(), torch.outer(sizes, ratios.rsqrt()).flatten()
    rebuilt = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
    if rebuilt.shape != cell.shape or not torch.allclose(rebuilt, cell.double(), rtol=1e-4, atol=1e-2):
        raise CheckpointError(f"{origin}: anchors that are no product of sizes and ratios around the cell's corner")
    return sizes.tolist(), [round(ratio, 5) for ratio in ratios.tolist()]
