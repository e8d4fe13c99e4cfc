"""Faster R-CNN with an FPN by the Detector contract."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.backbones import build_backbone
from defeat_cli.detectors.batched import (
    filter_proposals,
    learns_plainly,
    proposal_losses,
    proposes_plainly,
    sample_regions,
    samples_plainly,
)
from defeat_cli.detectors.contract import (
    Batch,
    Detector,
    Regions,
    TorchvisionAnchors,
    TorchvisionDetector,
    anchor_obstacle,
    at_least_float32,
)
from defeat_cli.detectors.conventions import (
    adopt_thinning,
    build_anchor_generator,
    build_roi_pool,
    transform_settings,
)
from defeat_cli.detectors.pooling import RoIPool

ANCHOR_SIZES = [[32.0], [64.0], [128.0], [256.0], [512.0]]
"""Anchor sides of P2 to P6, pixels."""

POOL_SIZE = 7
"""Side of the pooled features of one region."""


class FasterRCNNDetector(TorchvisionDetector, TorchvisionAnchors):
    """`torchvision.models.detection.FasterRCNN`: its regions are proposals, its classifier a softmax."""

    softmax = True

    def __init__(self, model: FasterRCNN, classes: list[str]) -> None:
        super().__init__(model, classes)
        # Boxes are decoded in the dtype of the heads' outputs, which autocast would leave in half precision.
        for head in (model.rpn.head, model.roi_heads.box_predictor):
            head.register_forward_hook(_outputs_in_float32)
        # torchvision takes the strides of its levels from the first image that it sees and keeps them: a small one that
        # is half padding would get them wrong for all that follow.
        if type(model.roi_heads.box_roi_pool) is MultiScaleRoIAlign:
            model.roi_heads.box_roi_pool = RoIPool.like(model.roi_heads.box_roi_pool)
        pool, strides = model.roi_heads.box_roi_pool, dict(zip(self._names, self.strides, strict=True))
        pooled = [stride for name, stride in strides.items() if name in pool.featmap_names]
        pool.scales = [1 / stride for stride in pooled]
        finest, coarsest = (round(math.log2(stride)) for stride in (pooled[0], pooled[-1]))
        pool.map_levels = initLevelMapper(finest, coarsest, pool.canonical_scale, pool.canonical_level)

    @property
    def _names(self) -> list[str]:
        """The names that the FPN gives its levels."""
        return [*self.model.backbone.body.return_layers.values(), "pool"]

    @property
    def anchor_generator(self) -> AnchorGenerator:
        return self.model.rpn.anchor_generator

    def cell_logits(self, features: list[Tensor]) -> list[Tensor]:
        """The objectness of the region proposal network, [N, A, 1, h, w] a level."""
        objectness, _ = self.model.rpn.head(features)
        return [logits[:, :, None] for logits in objectness]

    def cell_obstacle(self, teacher: Detector) -> str | None:
        if not isinstance(teacher, FasterRCNNDetector):
            return "one detector scores cells for classes, the other as places of objects"
        return anchor_obstacle(self.anchor_generator, teacher.anchor_generator)

    @torch.no_grad()
    def regions(self, features: list[Tensor], batch: Batch) -> Regions:
        """Proposals and ground-truth boxes, matched and sampled as in training (512 an image, a quarter foreground).

        How many proposals there are to sample from depends on the detector's mode, as in torchvision.
        """
        heads = self.model.roi_heads
        proposals, _ = self._proposals(features, batch)
        if samples_plainly(heads):
            boxes, labels, _ = self._sampled(proposals, batch)
        else:
            boxes, _, labels, _ = heads.select_training_samples(proposals, batch.targets)
        return Regions(boxes, labels, batch.sizes)

    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss_classifier`, `loss_box_reg`, `loss_objectness`, `loss_rpn_box_reg`. Needs training mode."""
        heads, named = self.model.roi_heads, self._named(features)
        proposals, rpn_losses = self._proposals(features, batch)
        if not learns_plainly(heads):  # a user's own model, which may learn in another way
            _, head_losses = heads(named, proposals, batch.sizes, batch.targets)
            return {**head_losses, **rpn_losses}
        boxes, labels, matched = self._sampled(proposals, batch)
        pooled = heads.box_roi_pool(named, boxes, batch.sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        classifier, box_reg = fastrcnn_loss(logits, deltas, labels, heads.box_coder.encode(matched, boxes))
        return {"loss_classifier": classifier, "loss_box_reg": box_reg, **rpn_losses}

    def detections(self, features: list[Tensor], batch: Batch) -> list[dict[str, Tensor]]:
        proposals, _ = self._proposals(features, batch)
        found, _ = self.model.roi_heads(self._named(features), proposals, batch.sizes)
        return found

    def classify(self, features: list[Tensor], regions: Regions) -> Tensor:
        """[R, K + 1] softmax logits, background first; box deltas are not computed."""
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(self._named(features), regions.boxes, regions.sizes)
        return heads.box_predictor.cls_score(heads.box_head(pooled).flatten(start_dim=1))

    def _proposals(self, features: list[Tensor], batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        """[P_i, 4] of each image and, in training mode, the losses of the region proposal network."""
        rpn = self.model.rpn
        if not proposes_plainly(rpn):  # a user's own
            return rpn(ImageList(batch.pixels, batch.sizes), self._named(features), batch.targets)
        objectness, deltas = rpn.head(features)
        anchors = self.anchors_of_image(features, batch)
        counts = [level[0].numel() for level in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        if getattr(rpn.filter_proposals, "__func__", None) is RegionProposalNetwork.filter_proposals:
            found = filter_proposals(rpn, objectness, deltas, anchors, counts, batch.sizes)
        else:
            images = len(batch.sizes)
            boxes = rpn.box_coder.decode(deltas.detach(), [anchors] * images).view(images, -1, 4)
            found, _ = rpn.filter_proposals(boxes, objectness, batch.sizes, counts)
        if not rpn.training:
            return found, {}
        boxes = [target["boxes"] for target in batch.targets]
        return found, proposal_losses(rpn, objectness, deltas, anchors, boxes)

    def _sampled(self, proposals: list[Tensor], batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, labels and matched boxes of each image's regions; see `batched.sample_regions`."""
        boxes, classes = ([target[key] for target in batch.targets] for key in ("boxes", "labels"))
        return sample_regions(self.model.roi_heads, proposals, boxes, classes)

    def _named(self, features: list[Tensor]) -> OrderedDict[str, Tensor]:
        """Features by the names that the FPN gives them; RoI pooling picks its levels by name."""
        return OrderedDict(zip(self._names, features, strict=True))


def _outputs_in_float32(_module: nn.Module, _inputs: tuple, outputs: tuple) -> tuple:
    """Forward hook for a head whose outputs are a pair of tensors, or of lists with a tensor per level."""
    return tuple(
        [at_least_float32(level) for level in output] if isinstance(output, list) else at_least_float32(output)
        for output in outputs
    )


def build_faster_rcnn(
    architecture: Architecture, num_classes: int, short_side: list[int], long_side: int
) -> FasterRCNN:
    """torchvision's Faster R-CNN on any backbone of the zoo.

    Args:
        num_classes: classes of the data, background not counted.
        short_side, long_side: resizing, see `recipe.Data`.

    Raises:
        RecipeError: `anchor_sizes` does not fit the five levels.
    """
    channels = architecture.fpn_channels
    model = FasterRCNN(
        build_backbone(architecture, one_stage=False),
        **transform_settings(architecture, short_side, long_side),
        rpn_anchor_generator=build_anchor_generator(architecture, ANCHOR_SIZES),
        rpn_pre_nms_top_n_train=architecture.proposals_train,
        rpn_pre_nms_top_n_test=architecture.proposals_before_nms or architecture.proposals,
        rpn_post_nms_top_n_train=architecture.proposals_train,
        rpn_post_nms_top_n_test=architecture.proposals,
        rpn_nms_thresh=architecture.proposal_nms_threshold,
        box_roi_pool=build_roi_pool(architecture, POOL_SIZE),
        box_head=TwoMLPHead(channels * POOL_SIZE**2, architecture.head_channels),
        box_predictor=FastRCNNPredictor(architecture.head_channels, num_classes + 1),
        box_score_thresh=architecture.score_threshold,
        box_nms_thresh=architecture.nms_threshold,
        box_detections_per_img=architecture.detections_per_image,
        box_batch_size_per_image=architecture.regions_per_image,
    )
    adopt_thinning(model, architecture)
    return model
