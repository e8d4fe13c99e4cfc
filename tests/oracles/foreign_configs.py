"""Whole configurations of mmdetection's and detectron2's, as each library writes them, and changes to them."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

from oracles.foreign_detectors import ForeignDetector


def mmdet_config(original: ForeignDetector, generation: int = 3, scale: tuple[int, int] = (640, 480)) -> dict[str, Any]:
    """The configuration of a detector of mmdetection 2.x or 3.x, as its base files have it."""
    style = original.style
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [1.0] * 4}
    box_test = {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100}
    model = {
        "backbone": {
            "type": "ResNet",
            "depth": 50,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "frozen_stages": 1,
            "norm_cfg": {"type": "BN", "requires_grad": True},
            "norm_eval": True,
            "style": "caffe" if style.stride_in_1x1 else "pytorch",
            "init_cfg": {"type": "Pretrained", "checkpoint": "torchvision://resnet50"},
        },
        "neck": {"type": "FPN", "in_channels": [256, 512, 1024, 2048], "out_channels": 256, "num_outs": 5},
    }
    anchors = {"type": "AnchorGenerator", "ratios": [0.5, 1.0, 2.0]}
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0}
    if original.two_stage:
        model |= {
            "type": "FasterRCNN",
            "rpn_head": {
                "type": "RPNHead",
                "in_channels": 256,
                "feat_channels": 256,
                "anchor_generator": {**anchors, "scales": [8], "strides": [4, 8, 16, 32, 64]},
                "bbox_coder": coder,
                "loss_cls": loss,
                "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
            },
            "roi_head": {
                "type": "StandardRoIHead",
                "bbox_roi_extractor": {
                    "type": "SingleRoIExtractor",
                    "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
                    "out_channels": 256,
                    "featmap_strides": [4, 8, 16, 32],
                },
                "bbox_head": {
                    "type": "Shared2FCBBoxHead",
                    "in_channels": 256,
                    "fc_out_channels": 1024,
                    "roi_feat_size": 7,
                    "num_classes": 80,
                    "bbox_coder": {**coder, "target_stds": [0.1, 0.1, 0.2, 0.2]},
                    "reg_class_agnostic": False,
                    "loss_cls": {**loss, "use_sigmoid": False},
                    "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
                },
            },
            "train_cfg": {"rpn": {"allowed_border": -1}, "rcnn": {"pos_weight": -1}},
            "test_cfg": {
                "rpn": {
                    "nms_pre": 1000,
                    "max_per_img": 1000,
                    "nms": {"type": "nms", "iou_threshold": 0.7},
                    "min_bbox_size": 0,
                },
                "rcnn": box_test,
            },
        }
    else:
        model["neck"] |= {"start_level": 1, "add_extra_convs": "on_input"}
        model |= {
            "type": "RetinaNet",
            "bbox_head": {
                "type": "RetinaHead",
                "num_classes": 80,
                "in_channels": 256,
                "stacked_convs": 4,
                "feat_channels": 256,
                "anchor_generator": {
                    **anchors,
                    "octave_base_scale": 4,
                    "scales_per_octave": 3,
                    "strides": [8, 16, 32, 64, 128],
                },
                "bbox_coder": coder,
                "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25},
                "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
            },
            "train_cfg": {"allowed_border": -1},
            "test_cfg": {"nms_pre": 1000, "min_bbox_size": 0, **box_test},
        }
    pixels = {"mean": list(style.mean), "std": list(style.std)}
    if generation == 3:
        model["data_preprocessor"] = {
            "type": "DetDataPreprocessor",
            **pixels,
            "bgr_to_rgb": not style.bgr,
            "pad_size_divisor": 32,
        }
        steps = [
            {"type": "LoadImageFromFile", "backend_args": None},
            {"type": "Resize", "scale": scale, "keep_ratio": True},
            {"type": "LoadAnnotations", "with_bbox": True},
            {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path")},
        ]
        data = {"test_dataloader": {"batch_size": 1, "dataset": {"type": "DetectionDataset", "pipeline": steps}}}
    else:
        transforms = [
            {"type": "Resize", "keep_ratio": True},
            {"type": "RandomFlip"},
            {"type": "Normalize", **pixels, "to_rgb": not style.bgr},
            {"type": "Pad", "size_divisor": 32},
            {"type": "ImageToTensor", "keys": ["img"]},
            {"type": "Collect", "keys": ["img"]},
        ]
        steps = [
            {"type": "LoadImageFromFile"},
            {"type": "MultiScaleFlipAug", "img_scale": scale, "flip": False, "transforms": transforms},
        ]
        data = {"data": {"samples_per_gpu": 2, "test": {"type": "DetectionDataset", "pipeline": steps}}}
    schedule = {"optimizer": {"type": "SGD", "lr": 0.02}, "work_dir": "./work_dirs/it", "load_from": None}
    return copy.deepcopy({"model": model, "test_pipeline": steps, **data, **schedule})


def detectron2_config(original: ForeignDetector) -> dict[str, Any]:
    """The `config.yaml` that detectron2 writes: its defaults are written out too."""
    bgr = original.style.bgr
    model: dict[str, Any] = {
        "META_ARCHITECTURE": "GeneralizedRCNN" if original.two_stage else "RetinaNet",
        "WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        "DEVICE": "cuda",
        "MASK_ON": False,
        "KEYPOINT_ON": False,
        "LOAD_PROPOSALS": False,
        "PIXEL_MEAN": list(original.style.mean),
        "PIXEL_STD": list(original.style.std),
        "BACKBONE": {
            "NAME": f"build_{'' if original.two_stage else 'retinanet_'}resnet_fpn_backbone",
            "FREEZE_AT": 2,
        },
        "RESNETS": {
            "DEPTH": 50,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "NUM_GROUPS": 1,
            "NORM": "FrozenBN",
            "WIDTH_PER_GROUP": 64,
            "STRIDE_IN_1X1": original.style.stride_in_1x1,
            "RES5_DILATION": 1,
            "RES2_OUT_CHANNELS": 256,
            "STEM_OUT_CHANNELS": 64,
            "DEFORM_ON_PER_STAGE": [False] * 4,
            "DEFORM_MODULATED": False,
            "DEFORM_NUM_GROUPS": 1,
        },
        "FPN": {
            "IN_FEATURES": ["res2", "res3", "res4", "res5"][0 if original.two_stage else 1 :],
            "OUT_CHANNELS": 256,
            "NORM": "",
            "FUSE_TYPE": "sum",
        },
        "ANCHOR_GENERATOR": {
            "NAME": "DefaultAnchorGenerator",
            "SIZES": [[side] for side in (32, 64, 128, 256, 512)],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
            "ANGLES": [[-90, 0, 90]],
            "OFFSET": 0.0,
        },
        "PROPOSAL_GENERATOR": {"NAME": "RPN", "MIN_SIZE": 0},
        "RPN": {
            "HEAD_NAME": "StandardRPNHead",
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "BOUNDARY_THRESH": -1,
            "IOU_THRESHOLDS": [0.3, 0.7],
            "BBOX_REG_WEIGHTS": [1.0] * 4,
            "PRE_NMS_TOPK_TRAIN": 2000,
            "PRE_NMS_TOPK_TEST": 1000,
            "POST_NMS_TOPK_TRAIN": 1000,
            "POST_NMS_TOPK_TEST": 1000,
            "NMS_THRESH": 0.7,
            "CONV_DIMS": [-1],
        },
        "ROI_HEADS": {
            "NAME": "StandardROIHeads",
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "SCORE_THRESH_TEST": 0.05,
            "NMS_THRESH_TEST": 0.5,
            "PROPOSAL_APPEND_GT": True,
        },
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead",
            "BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
            "SMOOTH_L1_BETA": 0.0,
            "POOLER_RESOLUTION": 7,
            "POOLER_SAMPLING_RATIO": 0,
            "POOLER_TYPE": "ROIAlignV2",
            "NUM_FC": 2,
            "FC_DIM": 1024,
            "NUM_CONV": 0,
            "NORM": "",
            "CLS_AGNOSTIC_BBOX_REG": False,
        },
        "ROI_MASK_HEAD": {"NAME": "MaskRCNNConvUpsampleHead"},
    }
    if not original.two_stage:
        model["ANCHOR_GENERATOR"]["SIZES"] = [[s * 2 ** (i / 3) for i in range(3)] for s in (32, 64, 128, 256, 512)]
        model["RETINANET"] = {
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
            "NUM_CONVS": 4,
            "BBOX_REG_WEIGHTS": [1.0] * 4,
            "SCORE_THRESH_TEST": 0.05,
            "TOPK_CANDIDATES_TEST": 1000,
            "NMS_THRESH_TEST": 0.5,
            "PRIOR_PROB": 0.01,
            "NORM": "",
        }
    return copy.deepcopy(
        {
            "VERSION": 2,
            "MODEL": model,
            "INPUT": {
                "FORMAT": "BGR" if bgr else "RGB",
                "MIN_SIZE_TEST": 800,
                "MAX_SIZE_TEST": 1333,
                "MIN_SIZE_TRAIN": [640, 800],
                "CROP": {"ENABLED": False},
                "MASK_FORMAT": "polygon",
            },
            "TEST": {"DETECTIONS_PER_IMAGE": 100, "AUG": {"ENABLED": False}},
            "SOLVER": {"BASE_LR": 0.02},
            "DATASETS": {"TRAIN": ["coco_2017_train"]},
            "OUTPUT_DIR": "./output",
            "SEED": -1,
        }
    )


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with values at dotted paths changed; a number in a path is a place in a list."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place = config
        for part in parents:
            place = place[part]
        place[last] = value
    return config


ODD = [None, True, -1, 0, 3.5, float("nan"), 10**400, "", "ResNet", [], [1], [[]], {}, {"type": "nms"}, {1: 2}, b"x"]


def mutated(config: dict[str, Any], random: Random, sections: list[str]) -> dict[str, Any]:
    """A configuration with one thing changed anywhere in a section: a value, a name, something left out or added."""
    config = copy.deepcopy(config)
    place, key = config, random.choice(sections)
    while random.random() < 0.85:
        inner = place[key]
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else []
        if not keys:
            break
        place, key = inner, random.choice(keys)
    kind = random.choice(["odd", "odd", "left out", "renamed", "added"])
    if kind == "odd" or not isinstance(place, dict):
        place[key] = random.choice(ODD)
    elif kind == "left out":
        del place[key]
    elif kind == "renamed":
        place[f"{key}_"] = place.pop(key)
    else:
        place[f"new_{key}"] = random.choice(ODD)
    return config


def as_text(config: dict[str, Any]) -> str:
    """A configuration as mmdetection writes it into its checkpoints."""
    return "".join(f"{name} = {_as_call(value)}\n" for name, value in config.items())


def _as_call(value: Any) -> str:
    if isinstance(value, dict) and all(isinstance(key, str) and key.isidentifier() for key in value):
        return f"dict({', '.join(f'{key}={_as_call(inner)}' for key, inner in value.items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_call, value))}]"
    return repr(value)
