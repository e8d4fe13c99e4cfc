"""RetinaNet by the Detector contract."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher, _box_loss
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.ops import sigmoid_focal_loss

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.backbones import build_backbone
from defeat_cli.detectors.batched import match, own_entries
from defeat_cli.detectors.contract import Target, TorchvisionAnchors
from defeat_cli.detectors.conventions import (
    ConventionRetinaNet,
    build_anchor_generator,
    thins_out_otherwise,
    transform_settings,
)
from defeat_cli.detectors.one_stage import OneStageDetector

ANCHOR_SIZES = [[float(int(side * 2 ** (third / 3))) for third in range(3)] for side in (32, 64, 128, 256, 512)]
"""Anchor sides of P3 to P7 in pixels, whole as torchvision has them."""


class RetinaNetDetector(OneStageDetector, TorchvisionAnchors):
    """`torchvision.models.detection.RetinaNet`: anchors that overlap a box a little are ignored, label -1."""

    @property
    def anchor_generator(self) -> AnchorGenerator:
        return self.model.anchor_generator

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.decode_single(deltas, anchors)

    def match(self, boxes: list[Tensor], anchors: Tensor, features: list[Tensor]) -> Tensor:
        return match(self.model.proposal_matcher, boxes, [anchors] * len(boxes)).view(len(boxes), -1)

    @property
    def _plain(self) -> bool:
        head = self.model.head
        return (
            type(head).compute_loss is RetinaNetHead.compute_loss
            and type(head.classification_head).compute_loss is RetinaNetClassificationHead.compute_loss
            and type(head.regression_head).compute_loss is RetinaNetRegressionHead.compute_loss
        )

    def _losses(
        self, outputs: dict[str, Tensor], anchors: Tensor, targets: list[Target], matched: Tensor
    ) -> dict[str, Tensor]:
        regression, images = self.model.head.regression_head, len(targets)
        groups = torch.stack([matched >= 0, matched != Matcher.BETWEEN_THRESHOLDS])
        foreground, counted = groups.sum(dim=2).tolist()
        objects, valid = torch.where(groups.flatten(1))[1].split([sum(foreground), sum(counted)])
        of_boxes = own_entries(matched, objects, [len(target["boxes"]) for target in targets])
        classes, boxes = (torch.cat([target[key] for target in targets])[of_boxes] for key in ("labels", "boxes"))
        logits, deltas = (outputs[key].flatten(0, 1) for key in ("cls_logits", "bbox_regression"))
        wanted = torch.zeros_like(logits)
        wanted[objects, classes] = 1.0
        # Image by image from here on: on a CPU the last bits of a sigmoid depend on how many are computed together.
        of_class = zip(logits[valid].split(counted), wanted[valid].split(counted), foreground, strict=True)
        of_box = (part.split(foreground) for part in (anchors[objects % len(anchors)], boxes, deltas[objects]))
        return {
            "classification": sum(
                sigmoid_focal_loss(ours, theirs, reduction="sum") / max(1, count) for ours, theirs, count in of_class
            )
            / images,
            "bbox_regression": sum(
                _box_loss(regression._loss_type, regression.box_coder, *parts) / max(1, len(parts[0]))
                for parts in zip(*of_box, strict=True)
            )
            / images,
        }


def build_retinanet(architecture: Architecture, num_classes: int, short_side: list[int], long_side: int) -> RetinaNet:
    """torchvision's RetinaNet on any backbone of the zoo. Its head is as wide as the FPN.

    Args:
        num_classes: classes of the data; one more column is built, for torchvision's labels begin at 1.
        short_side, long_side: resizing, see `recipe.Data`.

    Raises:
        RecipeError: `anchor_sizes` does not fit the five levels.
    """
    foreign = thins_out_otherwise(architecture.conventions)
    model = (ConventionRetinaNet if foreign else RetinaNet)(
        build_backbone(architecture, one_stage=True),
        num_classes + 1,
        **transform_settings(architecture, short_side, long_side),
        anchor_generator=build_anchor_generator(architecture, ANCHOR_SIZES),
        score_thresh=architecture.score_threshold,
        nms_thresh=architecture.nms_threshold,
        detections_per_img=architecture.detections_per_image,
        topk_candidates=architecture.candidates_per_level,
    )
    if foreign:
        model.adopt(architecture.conventions)
    return model
