"""RetinaNet by the Detector contract."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.backbones import build_backbone
from defeat_cli.detectors.batched import match
from defeat_cli.detectors.contract import TorchvisionAnchors
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
