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
from typing import Any

import torch
from torch import Tensor

from defeat_cli.checkpoints.conversion import (
    Tables,
    fold_bgr,
    renamed,
    require_whole,
    unit_range,
    with_background_first,
)
from defeat_cli.checkpoints.torchvision import coco_classes, resnet_name
from defeat_cli.checkpoints.weights import StateDict, Weights, is_state_dict
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.errors import CheckpointError

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

MEAN_BGR = [103.53, 116.28, 123.675]
STD_MSRA = [1.0, 1.0, 1.0]
STD_BGR = [57.375, 57.12, 58.395]
"""Mean and standard deviation that detectron2 takes where the file does not hold them; the last is for ResNeXt."""

SIZES = [32.0, 64.0, 128.0, 256.0, 512.0]


def matches(content: Any) -> bool:
    if isinstance(content, Mapping) and "blobs" in content:
        return True  # Detectron 1, to be refused by name
    state_dict = _unwrapped(content)
    prefixes = ("backbone.bottom_up.", "backbone.res2.", "proposal_generator.")
    return state_dict is not None and any(key.startswith(prefixes) for key in state_dict)


def to_weights(content: Any, origin: str, architecture: Architecture | None = None) -> Weights:
    """The detector in a detectron2 checkpoint. Its files say what they are: the caller's architecture is not needed.

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
    classes = with_background_first(converted, origin)
    body = {key.removeprefix(f"{_BODY}."): value for key, value in converted.items() if key.startswith(_BODY)}
    backbone = resnet_name(body, origin)
    mean, std, is_rgb = _normalization(state_dict, backbone)
    if not is_rgb:
        fold_bgr(converted)
        mean, std = mean[::-1], std[::-1]
    sizes, ratios = _anchors(state_dict, two_stage, origin)
    msra = not is_rgb and backbone in ("resnet50", "resnet101", "resnet152")
    p6 = converted.get("backbone.fpn.extra_blocks.p6.weight")
    fpn_channels = len(converted["backbone.fpn.layer_blocks.0.0.bias"])
    built = Architecture(
        detector="faster_rcnn" if two_stage else "retinanet",
        backbone=backbone,
        fpn_channels=fpn_channels,
        anchor_sizes=sizes,
        anchor_ratios=ratios,
        conventions=Conventions(
            image_mean=unit_range(mean),
            image_std=unit_range(std),
            stride_in_1x1=msra,
            batch_norm_eps=1e-5,
            roi_align_aligned=True,
            roi_align_sampling_ratio=0,
            edge_cases="detectron2",
            rounded_anchors=False,
            anchor_order="sizes-first",
            nominal_strides=True,
            p6_from="c5" if p6 is not None and p6.shape[1] != fpn_channels else "p5",
            p7_relu=True,
            clip_after_nms=not two_stage,
        ),
        **({"head_channels": len(converted["roi_heads.box_head.fc7.bias"])} if two_stage else {}),
    )
    names = coco_classes(classes) if classes == 80 else None
    notes = [
        f"a detectron2 checkpoint: {built.detector} on {backbone}, {classes} classes"
        + (", taken to be COCO's" if names else ""),
        "the background was the last class and is now the first"
        if two_stage
        else "a column for the background was added",
        "takes RGB as it was trained" if is_rgb else "trained on BGR: its first convolution now takes RGB",
        f"a bottleneck strides in its {'1x1' if msra else '3x3'} convolution",
        *dropped,
    ]
    return Weights("detectron2", converted, built, classes, names, short_side=800, long_side=1333, notes=notes)


def _unwrapped(content: Any) -> StateDict | None:
    inner = content.get("model") if isinstance(content, Mapping) and "model" in content else content
    if not is_state_dict(inner):
        return None
    return {key.removeprefix("module."): value for key, value in inner.items()}


def _normalization(state_dict: StateDict, backbone: str) -> tuple[list[float], list[float], bool]:
    """Pixel mean and std in the detector's channel order, and whether that is RGB: ImageNet is brightest in red."""
    default_std = STD_BGR if backbone.startswith("resnext") else STD_MSRA
    mean = state_dict["pixel_mean"].flatten().tolist() if "pixel_mean" in state_dict else MEAN_BGR
    std = state_dict["pixel_std"].flatten().tolist() if "pixel_std" in state_dict else default_std
    return mean, std, mean[0] > mean[2]


def _anchors(state_dict: StateDict, two_stage: bool, origin: str) -> tuple[list[list[float]], list[float]]:
    """Anchor sizes of each level, and ratios: detectron2's defaults, or those of the file."""
    cells = {key: value for key, value in state_dict.items() if ".cell_anchors." in f".{key}"}
    if not cells:
        octaves = [0.0] if two_stage else [0.0, 1 / 3, 2 / 3]
        return [[size * 2**octave for octave in octaves] for size in SIZES], [0.5, 1.0, 2.0]
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
