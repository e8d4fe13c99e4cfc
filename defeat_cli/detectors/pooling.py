"""RoIAlign as torchvision's, but quicker: one wait on a GPU, and on a CPU a backward pass that is one gather.

Pooling is linear: a bin is the weighted sum of the few cells around its sampling points. So the gradient of a cell is
the weighted sum of the gradients of the bins that it was part of, which `embedding_bag` computes a cell at a time with
the channels side by side; torchvision's kernel adds channel by channel, all over the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import _convert_to_roi_format

from defeat_cli.detectors.batched import on_device


class RoIPool(MultiScaleRoIAlign):
    """torchvision's RoIAlign over several levels, with the same outputs to the last bit, and gradients to rounding."""

    @classmethod
    def like(cls, pool: MultiScaleRoIAlign) -> RoIPool:
        """One that pools as another does."""
        return cls(
            pool.featmap_names,
            pool.output_size,
            pool.sampling_ratio,
            canonical_scale=pool.canonical_scale,
            canonical_level=pool.canonical_level,
        )

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = {name: level for name, level in x.items() if name in self.featmap_names}
        first = next(iter(maps.values()))
        if first.device.type != "cpu" and len(maps) > 1 and not torch.jit.is_tracing():
            return pool_with_one_wait(self, list(maps.values()), boxes)
        wanted = torch.is_grad_enabled() and any(level.requires_grad for level in maps.values())
        # With a sampling ratio of 0 a region has as many points as its size asks for, which is left to torchvision.
        if wanted and self.sampling_ratio > 0 and first.dtype.itemsize >= 4:
            return _Pooling.apply(self, boxes, image_shapes, list(maps), *maps.values())
        return super().forward(x, boxes, image_shapes)


def pool_with_one_wait(pool: MultiScaleRoIAlign, maps: list[Tensor], boxes: Sequence[Tensor]) -> Tensor:
    """torchvision's pooling, for which a host waits once for a GPU and not once for each level.

    Args:
        maps: [N, C, h, w] of each level that is pooled from; `pool.scales` are known.
        boxes: [R_i, 4] of each image, xyxy pixels.
    """
    every, counts = torch.cat(list(boxes)), torch.tensor([len(of_image) for of_image in boxes])
    images = torch.arange(len(boxes), dtype=every.dtype).repeat_interleave(counts)
    regions = torch.cat([images.to(every.device, non_blocking=True)[:, None], every], dim=1)
    levels, order = pool.map_levels([every]).sort(stable=True)
    ends = torch.searchsorted(levels, on_device(list(range(len(maps))), levels.device), right=True).tolist()
    regions = regions[order]
    pooled = maps[0].new_zeros(len(every), maps[0].shape[1], *pool.output_size)
    for level, scale, first, end in zip(maps, pool.scales, [0, *ends], ends, strict=False):
        of_level = roi_align(level, regions[first:end], pool.output_size, scale, pool.sampling_ratio)
        pooled[order[first:end]] = of_level.to(pooled.dtype)
    return pooled


class _Pooling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        pool: RoIPool,
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
        names: list[str],
        *maps: Tensor,
    ) -> Tensor:
        pooled = MultiScaleRoIAlign.forward(pool, dict(zip(names, maps, strict=True)), boxes, image_shapes)
        ctx.pool, ctx.boxes, ctx.shapes = pool, boxes, [tuple(level.shape) for level in maps]
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pool, images = ctx.pool, ctx.shapes[0][0]
        levels = pool.map_levels(ctx.boxes) if len(ctx.shapes) > 1 else None
        regions = _convert_to_roi_format(ctx.boxes)
        cells, weights = _cells_of_bins(regions, levels, ctx.shapes, pool.scales, pool.output_size, pool.sampling_ratio)
        sizes = [images * height * width for _, _, height, width in ctx.shapes]
        by_cell = _gathered(gradient, cells, weights, sum(sizes)).split(sizes)
        gradients = [
            of_level.view(images, height, width, channels).permute(0, 3, 1, 2)
            for of_level, (_, channels, height, width) in zip(by_cell, ctx.shapes, strict=True)
        ]
        return None, None, None, None, *gradients


def _cells_of_bins(
    regions: Tensor,
    levels: Tensor | None,
    shapes: list[tuple[int, int, int, int]],
    scales: list[float],
    output_size: tuple[int, int],
    points: int,
) -> tuple[Tensor, Tensor]:
    """The cells that each bin is the weighted sum of, and their weights.

    Args:
        regions: [R, 5], index of the image and xyxy pixels.
        levels: [R], index of the level that a region is pooled from; None where there is one.
        shapes: [N, C, h, w] of each level; scales: cells a pixel.
        output_size: P and Q, bins of a region in y and in x; points: samples S of a bin along each side.

    Returns:
        Both [R * P * Q, 4 S²]. Cells are counted through all levels, in each through images, rows and columns.
    """
    levels = torch.zeros(len(regions), dtype=torch.int64) if levels is None else levels
    images = shapes[0][0]
    heights, widths = (torch.tensor([shape[axis] for shape in shapes])[levels] for axis in (2, 3))
    sizes = torch.tensor([0, *(images * shape[2] * shape[3] for shape in shapes[:-1])])
    before = sizes.cumsum(0)[levels] + regions[:, 0].long() * heights * widths
    corners = regions[:, 1:] * torch.tensor(scales, dtype=regions.dtype)[levels, None]
    x1, y1, x2, y2 = corners.unbind(1)
    rows, of_rows = _along(y1, y2, heights, output_size[0], points)
    columns, of_columns = _along(x1, x2, widths, output_size[1], points)
    rows = before[:, None, None] + rows * widths[:, None, None]
    cells = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weights = of_rows[:, :, None, :, None] * of_columns[:, None, :, None, :]
    return cells.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


def _along(start: Tensor, end: Tensor, cells: Tensor, bins: int, points: int) -> tuple[Tensor, Tensor]:
    """The cells on both sides of each sampling point of a region along one axis, and their weights, [R, bins, 2 S].

    In the order of torchvision's own operations, so that a point at the edge of the map is inside here and there.

    Args:
        start, end: [R], in cells. cells: [R], how many the axis has.
    """
    side = ((end - start).clamp(min=1) / bins)[:, None, None]
    of_bin, of_point = torch.arange(bins)[:, None], torch.arange(points) + 0.5
    place = start[:, None, None] + of_bin * side + of_point * side / points
    count = cells[:, None, None]
    outside = (place < -1) | (place > count)
    place = place.clamp(min=0)
    low = torch.minimum(place.long(), count - 1)
    high = torch.minimum(low + 1, count - 1)
    share = torch.where(low == count - 1, 0, place - low)
    weights = torch.stack([1 - share, share], dim=-1).masked_fill(outside[..., None], 0) / points
    return torch.stack([low, high], dim=-1).flatten(2), weights.flatten(2)


def _gathered(gradient: Tensor, cells: Tensor, weights: Tensor, count: int) -> Tensor:
    """[count, C]: of each cell, the weighted sum of the gradients [R, C, P, Q] of the bins that it is part of."""
    of_bins = gradient.permute(0, 2, 3, 1).flatten(0, 2)
    cells, order = cells.flatten().sort(stable=True)
    first = torch.searchsorted(cells, torch.arange(count))
    bins = order.div(weights.shape[1], rounding_mode="floor")
    of_bins = of_bins.contiguous()
    return F.embedding_bag(bins, of_bins, first, mode="sum", per_sample_weights=weights.flatten()[order].to(of_bins))
