"""Where detectors of other libraries compute differently from torchvision's: small subclasses, one a difference.

None adds a parameter or changes a key, so a converted state dict still loads into torchvision's plain model; it is only
there that the outputs would differ a little. `recipe.Conventions` says which of them a detector wants.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from defeat_cli.errors import RecipeError
from defeat_cli.recipe import Architecture

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
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
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
    if not conventions.roi_align_aligned and conventions.roi_levels == "torchvision":
        return MultiScaleRoIAlign(POOLED_LEVELS, output_size, conventions.roi_align_sampling_ratio)
    return ConventionRoIAlign(
        output_size,
        conventions.roi_align_sampling_ratio,
        aligned=conventions.roi_align_aligned,
        levels=conventions.roi_levels,
    )
