"""Where detectors of other libraries compute differently from torchvision's: small subclasses, one a difference.

They take sizes from `shape`, not from `len`, so that tracing (`defeat export`) does not freeze them.
None adds a parameter or changes a key, so a converted state dict still loads into torchvision's plain model; it is only
there that the outputs would differ a little. `recipe.Conventions` says which of them a detector wants.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder, _topk_min
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.errors import RecipeError

POOLED_LEVELS = ["0", "1", "2", "3"]
"""Names of the FPN levels that regions are pooled from, P2 to P5."""

POOLED_STRIDES = [4, 8, 16, 32]


class ConventionAnchors(AnchorGenerator):
    """Anchors as mmdetection and detectron2 have them, whose sides are not rounded to whole pixels.

    detectron2 goes through sizes first, then ratios; torchvision and mmdetection the other way round. Both take the
    nominal strides (each level's is twice that of the level before), where torchvision divides the padded image's side
    by the map's, rounding down: at stride 64 an image of 800 has a map of 13, and torchvision steps by 61.
    """

    def __init__(
        self, sizes: list[list[float]], ratios: list[float], *, rounded: bool, sizes_first: bool, nominal_strides: bool
    ) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
        self.nominal_strides = nominal_strides
        self.cell_anchors = [_cell_anchors(level, ratios, rounded, sizes_first) for level in sizes]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        if not self.nominal_strides:
            return super().forward(image_list, feature_maps)
        shapes = [tuple(feature.shape[-2:]) for feature in feature_maps]
        # Images are padded to a multiple of 32, so the first level's stride (4 or 8) divides them exactly.
        first = image_list.tensors.shape[-2] // shapes[0][0]
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        anchors = self.grid_anchors(shapes, [(first * 2**level,) * 2 for level in range(len(shapes))])
        return [torch.cat(anchors)] * len(image_list.image_sizes)


def _cell_anchors(sizes: list[float], ratios: list[float], rounded: bool, sizes_first: bool) -> Tensor:
    """[A, 4] anchors around the origin; a ratio is height over width."""
    side = torch.tensor(sizes, dtype=torch.float64)
    stretch = torch.tensor(ratios, dtype=torch.float64).sqrt()
    widths, heights = side / stretch[:, None], side * stretch[:, None]
    if sizes_first:
        widths, heights = widths.T, heights.T
    halves = torch.stack([widths.flatten(), heights.flatten()], dim=1) / 2
    cells = torch.cat([-halves, halves], dim=1).float()
    return cells.round() if rounded else cells


class ConventionRoIAlign(MultiScaleRoIAlign):
    """RoIAlign as mmdetection and detectron2 have it: boxes shifted by half a pixel, and their own rounding where a box
    stands on the boundary between two levels."""

    def __init__(self, output_size: int, sampling_ratio: int, *, aligned: bool, levels: str) -> None:
        super().__init__(POOLED_LEVELS, output_size, sampling_ratio)
        self.aligned = aligned
        self.level_of_side = LEVEL_OF_SIDE[levels]

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = [x[name] for name in self.featmap_names]
        images = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        every = torch.cat(boxes)
        rois = torch.cat([images, every], dim=1)
        side = ((every[:, 2] - every[:, 0]) * (every[:, 3] - every[:, 1])).sqrt()
        levels = self.level_of_side(side).clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *self.output_size)
        for level, (feature, stride) in enumerate(zip(maps, POOLED_STRIDES, strict=True)):
            chosen = torch.where(levels == level)[0]
            pooled[chosen] = roi_align(
                feature, rois[chosen], self.output_size, 1 / stride, self.sampling_ratio, self.aligned
            ).to(pooled.dtype)
        return pooled


LEVEL_OF_SIDE = {
    "torchvision": lambda side: torch.floor(4 + torch.log2(side / 224) + 1e-6) - 2,
    "mmdetection": lambda side: torch.floor(torch.log2(side / 56 + 1e-6)),
    "detectron2": lambda side: torch.floor(4 + torch.log2(side / 224 + 1e-8)) - 2,
}
"""Index of the FPN level that a region of a given side, in pixels, is pooled from, before clamping."""


class PlainP6P7(LastLevelP6P7):
    """P6 and P7 without a ReLU between them, as mmdetection has them."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class SymmetricBoxCoder(BoxCoder):
    """mmdetection's: a box may shrink by no more than the factor that it may grow by, 1000 / 16."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        _, _, width_weight, height_weight = self.weights
        lowest = [-math.inf, -math.inf, -self.bbox_xform_clip * width_weight, -self.bbox_xform_clip * height_weight]
        deltas = rel_codes.unflatten(1, (-1, 4))
        return super().decode_single(deltas.maximum(deltas.new_tensor(lowest)).flatten(1), boxes)


class LogitProposals(RegionProposalNetwork):
    """detectron2's: proposals are ranked by their logits. torchvision and mmdetection rank them by the sigmoid, which
    rounds the surest ones to the same score."""

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        # A sixteenth of the logits has the same order, and stays clear of where a sigmoid is flat.
        return super().filter_proposals(proposals, objectness / 16, image_shapes, num_anchors_per_level)


class ConventionRoIHeads(RoIHeads):
    """Boxes that clipping leaves without area: torchvision drops those thinner than 0.01 pixels before suppression;
    mmdetection keeps all, and detectron2 drops empty ones at the very end."""

    drop_empty = False

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        counts = [of_image.shape[0] for of_image in proposals]
        every_box = self.box_coder.decode(box_regression, proposals)[:, 1:].split(counts)
        every_score = class_logits.softmax(dim=1)[:, 1:].split(counts)
        results = []
        for boxes, scores, shape in zip(every_box, every_score, image_shapes, strict=True):
            regions, classes = torch.where(scores > self.score_thresh)
            boxes, scores, labels = (
                clip_boxes_to_image(boxes[regions, classes], shape),
                scores[regions, classes],
                classes + 1,
            )
            kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            if self.drop_empty:
                kept = kept[_has_area(boxes[kept])]
            results.append((boxes[kept], scores[kept], labels[kept]))
        return tuple(map(list, zip(*results, strict=True)))


class ConventionRetinaNet(RetinaNet):
    """RetinaNet whose boxes without area are dropped: by mmdetection before suppression, by detectron2 at the very end.
    Also detectron2 suppresses boxes that are not clipped to the image yet."""

    clip_after_nms = False
    drop_empty_first = False

    def adopt(self, conventions: Conventions) -> None:
        """Follow these conventions; built without them it follows torchvision's, but for the empty boxes."""
        self.clip_after_nms = conventions.clip_after_nms
        if conventions.edge_cases == "mmdetection":
            self.drop_empty_first = True
            self.box_coder = SymmetricBoxCoder(self.box_coder.weights)

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        results = []
        for image, shape in enumerate(image_shapes):
            levels = zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], anchors[image], strict=True)
            candidates = [self._candidates(logits[image], deltas[image], a) for logits, deltas, a in levels]
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*candidates, strict=True))
            if not self.clip_after_nms:
                boxes = clip_boxes_to_image(boxes, shape)
            if self.drop_empty_first:
                full = _has_area(boxes)
                boxes, scores, labels = boxes[full], scores[full], labels[full]
            kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            boxes, scores, labels = clip_boxes_to_image(boxes[kept], shape), scores[kept], labels[kept]
            full = _has_area(boxes)
            results.append({"boxes": boxes[full], "scores": scores[full], "labels": labels[full]})
        return results

    def _candidates(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of one level's best (anchor, class) pairs, best first."""
        scores = logits.sigmoid()
        rows, labels = torch.where(scores > self.score_thresh)
        scores = scores[rows, labels]
        scores, best = scores.topk(_topk_min(scores, self.topk_candidates, 0))
        rows, labels = rows[best], labels[best]
        return self.box_coder.decode_single(deltas[rows], anchors[rows]), scores, labels


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def build_anchor_generator(architecture: Architecture, default_sizes: list[list[float]]) -> AnchorGenerator:
    """The anchors of an architecture.

    Args:
        default_sizes: sides in pixels per level, where the architecture has none.

    Raises:
        RecipeError: another number of levels, or levels with different numbers of anchors, which share one head.
    """
    sizes, ratios = architecture.anchor_sizes or default_sizes, architecture.anchor_ratios
    if len(sizes) != len(default_sizes) or len({len(level) for level in sizes}) != 1 or not sizes[0]:
        raise RecipeError(
            f"anchor_sizes: expected {len(default_sizes)} lists of equal length, one per FPN level, "
            f"e.g. {default_sizes} (got {sizes})"
        )
    conventions = architecture.conventions
    if conventions.rounded_anchors and conventions.anchor_order == "ratios-first" and not conventions.nominal_strides:
        return AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
    return ConventionAnchors(
        sizes,
        ratios,
        rounded=conventions.rounded_anchors,
        sizes_first=conventions.anchor_order == "sizes-first",
        nominal_strides=conventions.nominal_strides,
    )


def build_roi_pool(architecture: Architecture, output_size: int) -> nn.Module:
    """RoI pooling of an architecture: [R, C, output_size, output_size]."""
    conventions = architecture.conventions
    if not conventions.roi_align_aligned and conventions.edge_cases == "torchvision":
        return MultiScaleRoIAlign(POOLED_LEVELS, output_size, conventions.roi_align_sampling_ratio)
    return ConventionRoIAlign(
        output_size,
        conventions.roi_align_sampling_ratio,
        aligned=conventions.roi_align_aligned,
        levels=conventions.edge_cases,
    )


def adopt_edge_cases(model: FasterRCNN, architecture: Architecture) -> None:
    """Give a Faster R-CNN another library's rules for boxes that hardly are boxes."""
    library = architecture.conventions.edge_cases
    if library == "torchvision":
        return
    rpn, heads = model.rpn, model.roi_heads
    if library == "detectron2":
        model.rpn = LogitProposals(
            rpn.anchor_generator,
            rpn.head,
            fg_iou_thresh=rpn.proposal_matcher.high_threshold,
            bg_iou_thresh=rpn.proposal_matcher.low_threshold,
            batch_size_per_image=rpn.fg_bg_sampler.batch_size_per_image,
            positive_fraction=rpn.fg_bg_sampler.positive_fraction,
            pre_nms_top_n=rpn._pre_nms_top_n,
            post_nms_top_n=rpn._post_nms_top_n,
            nms_thresh=rpn.nms_thresh,
        )
    # torchvision drops proposals thinner than 0.001 pixels, the others those without area.
    model.rpn.min_size = torch.finfo(torch.float32).tiny
    model.roi_heads = ConventionRoIHeads(
        heads.box_roi_pool,
        heads.box_head,
        heads.box_predictor,
        fg_iou_thresh=heads.proposal_matcher.high_threshold,
        bg_iou_thresh=heads.proposal_matcher.low_threshold,
        batch_size_per_image=heads.fg_bg_sampler.batch_size_per_image,
        positive_fraction=heads.fg_bg_sampler.positive_fraction,
        bbox_reg_weights=heads.box_coder.weights,
        score_thresh=heads.score_thresh,
        nms_thresh=heads.nms_thresh,
        detections_per_img=heads.detections_per_img,
    )
    model.roi_heads.drop_empty = library == "detectron2"
    if library == "mmdetection":
        for part in (model.rpn, model.roi_heads):
            part.box_coder = SymmetricBoxCoder(part.box_coder.weights)
