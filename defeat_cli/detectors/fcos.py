"""FCOS by the Detector contract."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.backbones import build_backbone
from defeat_cli.detectors.batched import match_points, own_entries
from defeat_cli.detectors.contract import Target
from defeat_cli.detectors.conventions import refuse_thinning, transform_settings
from defeat_cli.detectors.one_stage import OneStageDetector
from defeat_cli.errors import RecipeError

POINT_SIZES = ((8,), (16,), (32,), (64,), (128,))
"""torchvision describes a point by a square box of its level's stride."""

NORM_GROUPS = 32
"""Groups of the GroupNorm in torchvision's FCOS head."""


class FCOSDetector(OneStageDetector):
    """`torchvision.models.detection.FCOS`: points near the middle of a box are foreground, all others background."""

    @property
    def anchor_generator(self) -> AnchorGenerator:
        return self.model.anchor_generator

    def _box_outputs(self, box_map: Tensor) -> Tensor:
        return super()._box_outputs(box_map).relu()

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.decode(deltas, anchors)

    def match(self, boxes: list[Tensor], anchors: Tensor, features: list[Tensor]) -> Tensor:
        counts = [feature.shape[-2] * feature.shape[-1] for feature in features]
        return match_points(self.model.center_sampling_radius, boxes, anchors, counts)

    @property
    def _plain(self) -> bool:
        return type(self.model.head).compute_loss is FCOSHead.compute_loss

    def _losses(
        self, outputs: dict[str, Tensor], anchors: Tensor, targets: list[Target], matched: Tensor
    ) -> dict[str, Tensor]:
        coder = self.model.head.box_coder
        objects = torch.where((matched >= 0).flatten())[0]
        points = anchors[objects % len(anchors)]
        of_boxes = own_entries(matched, objects, [len(target["boxes"]) for target in targets])
        classes, boxes = (torch.cat([target[key] for target in targets])[of_boxes] for key in ("labels", "boxes"))
        logits = outputs["cls_logits"]
        wanted = torch.zeros_like(logits)
        wanted.flatten(0, 1)[objects, classes] = 1.0
        found = coder.decode(outputs["bbox_regression"].flatten(0, 1)[objects], points)
        across, down = coder.encode(points, boxes).view(-1, 2, 2).unbind(2)
        centred = (across.amin(1) / across.amax(1) * (down.amin(1) / down.amax(1))).sqrt()
        losses = {
            "classification": sigmoid_focal_loss(logits, wanted, reduction="sum"),
            "bbox_regression": generalized_box_iou_loss(found, boxes, reduction="sum"),
            "bbox_ctrness": F.binary_cross_entropy_with_logits(
                outputs["bbox_ctrness"].flatten()[objects], centred, reduction="sum"
            ),
        }
        return {name: loss / max(1, len(objects)) for name, loss in losses.items()}


def build_fcos(architecture: Architecture, num_classes: int, short_side: list[int], long_side: int) -> FCOS:
    """torchvision's FCOS on any backbone of the zoo. Its head is as wide as the FPN.

    Args:
        num_classes: classes of the data; one more column is built, for torchvision's labels begin at 1.
        short_side, long_side: resizing, see `recipe.Data`.

    Raises:
        RecipeError: anchor sizes, which FCOS does not have, an FPN width that its head cannot normalise, or conventions
            that it cannot follow.
    """
    if architecture.anchor_sizes is not None:
        raise RecipeError("anchor_sizes: fcos classifies points and has no anchors; leave it null")
    # A group of one channel on a map of one cell (P7 of a small image) has nothing to be normalised by.
    if architecture.fpn_channels % NORM_GROUPS or architecture.fpn_channels == NORM_GROUPS:
        raise RecipeError(
            f"fpn_channels: must be 64, 96, 128, … for fcos, whose head normalises {NORM_GROUPS} groups of channels "
            f"(got {architecture.fpn_channels})"
        )
    refuse_thinning(architecture)
    return FCOS(
        build_backbone(architecture, one_stage=True),
        num_classes + 1,
        **transform_settings(architecture, short_side, long_side),
        anchor_generator=AnchorGenerator(POINT_SIZES, ((1.0,),) * len(POINT_SIZES)),
        score_thresh=architecture.score_threshold,
        nms_thresh=architecture.nms_threshold,
        detections_per_img=architecture.detections_per_image,
        topk_candidates=architecture.candidates_per_level,
    )
