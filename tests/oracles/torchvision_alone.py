"""Tiny students of each family, and their evaluation, by torchvision and pycocotools alone."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.functional import pil_to_tensor

WIDTHS = [16, 16, 32, 32]
ANCHORS = {
    "faster_rcnn": [[8], [16], [32], [64], [96]],
    "retinanet": [[8, 11], [16, 22], [32, 45], [64, 90], [96, 120]],
    "fcos": None,
}
FPN_CHANNELS = {"faster_rcnn": 8, "retinanet": 64, "fcos": 64}


def tiny_settings(family: str) -> list[str]:
    """`--set` options that make the student of the tiny recipe the one of `tiny_model`."""
    settings = {
        "detector": family, "widths": WIDTHS, "fpn_channels": FPN_CHANNELS[family],
        "anchor_sizes": ANCHORS[family] or "null",
    }  # fmt: skip
    return [part for name, value in settings.items() for part in ("--set", f"student.{name}={value}")]


def tiny_model(family: str, **settings: Any) -> nn.Module:
    """The student of a family as the README shows it, for six classes, with other settings where some are given."""
    net = RegNet(BlockParams([1] * 4, WIDTHS, WIDTHS, [1.0] * 4, [2] * 4), stem_width=WIDTHS[0])
    body = nn.Sequential(OrderedDict([("stem", net.stem), *net.trunk_output.named_children()]))
    channels, sides = FPN_CHANNELS[family], {"min_size": 64, "max_size": 64}
    if family == "faster_rcnn":
        own = {
            "box_score_thresh": 0.0, "rpn_pre_nms_top_n_test": 32, "rpn_post_nms_top_n_test": 32,
            "box_head": TwoMLPHead(channels * 7 * 7, 16), "box_predictor": FastRCNNPredictor(16, 7),
            "rpn_anchor_generator": _anchors(family),
        }  # fmt: skip
        backbone = BackboneWithFPN(body, {f"block{i + 1}": str(i) for i in range(4)}, WIDTHS, channels)
        return FasterRCNN(backbone, **{**sides, **own, **settings})
    own = {"score_thresh": 0.0, "nms_thresh": 0.5, "detections_per_img": 100}
    returned, extra = {f"block{i + 2}": str(i) for i in range(3)}, LastLevelP6P7(channels, channels)
    backbone = BackboneWithFPN(body, returned, WIDTHS[1:], channels, extra_blocks=extra)
    if family == "fcos":
        return FCOS(backbone, 7, **{**sides, **own, **settings})
    return RetinaNet(backbone, 7, anchor_generator=_anchors(family), **{**sides, **own, **settings})


def _anchors(family: str) -> AnchorGenerator:
    return AnchorGenerator(tuple(map(tuple, ANCHORS[family])), ((0.5, 1.0, 2.0),) * 5)


def evaluate_alone(model: nn.Module, weights: Path, data: Path, split: str) -> tuple[list[dict], list[float]]:
    """Detections in COCO results format, and the twelve figures.

    torchvision's reference loop, in its shortest form: one image at a time, labels are category ids.
    """
    model.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    model.eval()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(data / f"{split}.json")
    results = []
    for image in coco.loadImgs(coco.getImgIds()):
        pixels = pil_to_tensor(Image.open(data / "images" / image["file_name"]).convert("RGB")).float() / 255
        with torch.no_grad():
            (output,) = model([pixels])
        for (x1, y1, x2, y2), score, label in zip(
            output["boxes"].tolist(), output["scores"].tolist(), output["labels"].tolist(), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image["id"], "category_id": label, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(coco, coco.loadRes([dict(result) for result in results]), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return results, list(scorer.stats)
