"""Where detectors of other libraries compute differently from torchvision's: small subclasses, one a difference.

They take sizes from `shape`, not from `len`, so that tracing (`defeat export`) does not freeze them.
None adds a parameter or changes a key, so a converted state dict still loads into torchvision's plain model; it is only
there that the outputs would differ a little. `recipe.Conventions` says which of them a detector wants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder, _topk_min
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import (
    MultiScaleRoIAlign,
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    remove_small_boxes,
    roi_align,
)
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.errors import RecipeError

SomeModule = TypeVar("SomeModule", bound=nn.Module)

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


class ConventionProposals(RegionProposalNetwork):
    """Proposals suppressed by their logits, as detectron2 has it: torchvision and mmdetection take the sigmoid, which
    rounds the surest ones to the same score. Also boxes may stay outside of the image, as mmdetection can be told."""

    def adopt(self, conventions: Conventions) -> None:
        self.by_logit = conventions.edge_cases == "detectron2"
        self.clip = conventions.clip_proposals
        self.smallest = _smallest(conventions, ("mmdetection", "detectron2"))

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        logits = objectness.detach().reshape(len(proposals), -1)
        levels = torch.cat([torch.full((n,), i, device=logits.device) for i, n in enumerate(num_anchors_per_level)])
        results = []
        best_of_all = self._get_top_n_idx(logits, num_anchors_per_level)
        for boxes, scores, best, shape in zip(proposals, logits, best_of_all, image_shapes, strict=True):
            boxes, scores, of_level = boxes[best], scores[best], levels[best]
            scores = scores if self.by_logit else scores.sigmoid()
            boxes = clip_boxes_to_image(boxes, shape) if self.clip else boxes
            stock = self.smallest is None
            large = remove_small_boxes(boxes, self.min_size) if stock else _has_area(boxes, self.smallest)
            boxes, scores, of_level = boxes[large], scores[large], of_level[large]
            kept = batched_nms(boxes, scores, of_level, self.nms_thresh)[: self.post_nms_top_n()]
            results.append((boxes[kept], scores[kept]))
        return tuple(map(list, zip(*results, strict=True)))


@dataclass(frozen=True)
class Suppression:
    """How overlapping detections of an image are thinned out; `Conventions` says what the settings mean."""

    threshold: float
    kind: str
    sigma: float
    least_score: float
    across_classes: bool

    @classmethod
    def of(cls, conventions: Conventions, threshold: float) -> Suppression:
        return cls(
            threshold,
            conventions.suppression,
            conventions.suppression_sigma,
            conventions.suppression_least_score,
            conventions.suppression_across_classes,
        )

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Indices of at most `limit` boxes, best first, and their scores, which soft-NMS (arXiv 1704.04503) lowers.

        Args:
            boxes: [D, 4] xyxy.
            scores: [D] in [0, 1].
            labels: [D]; boxes of different labels leave each other alone, unless suppression goes across classes.
        """
        groups = torch.zeros_like(labels) if self.across_classes else labels
        if self.kind == "hard":
            kept = batched_nms(boxes, scores, groups, self.threshold)[:limit]
            return kept, scores[kept]
        left, kept = scores.clone(), []
        alive = torch.ones_like(labels, dtype=torch.bool)
        while len(kept) < limit and bool(alive.any()):
            best = left.where(alive, -1.0).argmax()
            kept.append(best)
            alive[best] = False
            overlap = box_iou(boxes[best, None], boxes)[0].nan_to_num(0.0) * (groups == groups[best])
            share = torch.exp(-overlap.square() / self.sigma)
            if self.kind == "linear":
                share = torch.where(overlap >= self.threshold, 1 - overlap, 1.0)
            left = torch.where(alive, left * share, left)
            alive &= left >= self.least_score
        kept = torch.stack(kept) if kept else labels[:0]
        return kept, left[kept]


class ConventionRoIHeads(RoIHeads):
    """Detections suppressed as the conventions say. Of boxes that clipping leaves without area, torchvision drops those
    thinner than 0.01 pixels before suppression, detectron2 empty ones at the very end; mmdetection keeps all."""

    def adopt(self, conventions: Conventions) -> None:
        self.clip = conventions.clip_detections
        self.suppress = Suppression.of(conventions, self.nms_thresh)
        self.thinnest = 0.01 if conventions.edge_cases == "torchvision" else 0.0
        self.drop_empty = conventions.edge_cases == "detectron2"

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        counts = [of_image.shape[0] for of_image in proposals]
        every_box = self.box_coder.decode(box_regression, proposals)[:, 1:].split(counts)
        every_score = class_logits.softmax(dim=1)[:, 1:].split(counts)
        results = []
        for boxes, scores, shape in zip(every_box, every_score, image_shapes, strict=True):
            regions, classes = torch.where(scores > self.score_thresh)
            boxes, scores, labels = boxes[regions, classes], scores[regions, classes], classes + 1
            boxes = clip_boxes_to_image(boxes, shape) if self.clip else boxes
            large = remove_small_boxes(boxes, self.thinnest)
            boxes, scores, labels = boxes[large], scores[large], labels[large]
            kept, scores = self.suppress(boxes, scores, labels, self.detections_per_img)
            boxes, labels = boxes[kept], labels[kept]
            full = _has_area(boxes) if self.drop_empty else torch.ones_like(boxes[:, 0], dtype=torch.bool)
            results.append((boxes[full], scores[full], labels[full]))
        return tuple(map(list, zip(*results, strict=True)))


class ConventionRetinaNet(RetinaNet):
    """RetinaNet that suppresses as the conventions say. Boxes without area are dropped by mmdetection before, by
    detectron2 after suppression. Also detectron2 suppresses boxes that are not clipped to the image yet."""

    def adopt(self, conventions: Conventions) -> None:
        """Follow these conventions."""
        self.clip, self.clip_after_nms = conventions.clip_detections, conventions.clip_after_nms
        self.suppress = Suppression.of(conventions, self.nms_thresh)
        self.smallest = _smallest(conventions, ("mmdetection",))
        self.drop_empty = conventions.edge_cases == "detectron2"
        if conventions.edge_cases == "mmdetection":
            self.box_coder = SymmetricBoxCoder(self.box_coder.weights)

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        results = []
        for image, shape in enumerate(image_shapes):
            levels = zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], anchors[image], strict=True)
            candidates = [self._candidates(logits[image], deltas[image], a) for logits, deltas, a in levels]
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*candidates, strict=True))
            if self.clip and not self.clip_after_nms:
                boxes = clip_boxes_to_image(boxes, shape)
            if self.smallest is not None:
                large = _has_area(boxes, self.smallest)
                boxes, scores, labels = boxes[large], scores[large], labels[large]
            kept, scores = self.suppress(boxes, scores, labels, self.detections_per_img)
            boxes, labels = boxes[kept], labels[kept]
            boxes = clip_boxes_to_image(boxes, shape) if self.clip else boxes
            full = _has_area(boxes) if self.drop_empty else torch.ones_like(boxes[:, 0], dtype=torch.bool)
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


def _smallest(conventions: Conventions, of_zero: tuple[str, ...]) -> float | None:
    """What sides must exceed before suppression; the libraries `of_zero` drop boxes without area if nothing is said."""
    if conventions.smallest_box is None and conventions.edge_cases in of_zero:
        return 0.0
    return conventions.smallest_box


def _has_area(boxes: Tensor, smallest: float = 0.0) -> Tensor:
    """[D] bool: both sides are longer than `smallest`."""
    return ((boxes[:, 2:] - boxes[:, :2]) > smallest).all(dim=1)


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


THINNING = (
    "edge_cases",
    "clip_proposals",
    "clip_detections",
    "clip_after_nms",
    "smallest_box",
    "suppression",
    "suppression_across_classes",
)
"""Conventions that torchvision's own post-processing does not know."""


def thins_out_otherwise(conventions: Conventions) -> bool:
    """Whether proposals and detections are thinned out in another way than torchvision does it."""
    return bool(_changed(conventions))


def _changed(conventions: Conventions) -> list[str]:
    stock = Conventions()
    return [name for name in THINNING if getattr(conventions, name) != getattr(stock, name)]


def refuse_thinning(architecture: Architecture) -> None:
    """Refuse conventions for a detector whose post-processing is torchvision's own.

    Raises:
        RecipeError: names those that it cannot follow.
    """
    names = _changed(architecture.conventions)
    if names:
        raise RecipeError(
            f"{architecture.detector} is built as torchvision has it, and cannot follow conventions."
            f"{', conventions.'.join(names)}; leave them out"
        )


def adopt_thinning(model: FasterRCNN, architecture: Architecture) -> None:
    """Let a Faster R-CNN thin out proposals and detections as its conventions say."""
    conventions = architecture.conventions
    if not thins_out_otherwise(conventions):
        return
    model.rpn = _turned_into(ConventionProposals, model.rpn)
    model.roi_heads = _turned_into(ConventionRoIHeads, model.roi_heads)
    for part in (model.rpn, model.roi_heads):
        part.adopt(conventions)
        if conventions.edge_cases == "mmdetection":
            part.box_coder = SymmetricBoxCoder(part.box_coder.weights)


def _turned_into(kind: type[SomeModule], module: nn.Module) -> SomeModule:
    """A module of a subclass with everything that `module` has, which takes no further arguments."""
    turned = kind.__new__(kind)
    turned.__dict__.update(module.__dict__)
    return turned


def transform_settings(architecture: Architecture, short_side: list[int], long_side: int) -> dict[str, Any]:
    """How torchvision's detectors are told to resize and normalise images."""
    conventions = architecture.conventions
    return {
        "min_size": tuple(short_side),
        "max_size": long_side,
        "image_mean": conventions.image_mean,
        "image_std": conventions.image_std,
        **({} if conventions.keep_ratio else {"fixed_size": (long_side, short_side[-1])}),
    }
