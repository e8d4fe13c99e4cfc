"""Foreground masks: which cells of a feature map lie on objects, by each of the definitions that the paper compares.

Boxes are xyxy in network-input pixels, one [M, 4] tensor an image. A mask is [N, h, w], one for each level: bool, or
float in [0, 1] where cells count in part. Nothing here loops over single boxes or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Shape = tuple[int, int]

BACKBONE_MASK_STRIDE = 4
"""Backbone masks are drawn at this stride, then resized to each stage (DeFeat's published code)."""

MAX_ELEMENTS = 1 << 23
"""Boxes times cells, or boxes times anchors, that are held at once; more are worked through in chunks of boxes."""

IN_CACHE = 1 << 18
"""The same for boxes times anchors on a CPU, where what stays in its cache is several times as fast."""


@torch.no_grad()
def box_masks(
    boxes: Sequence[Tensor], shapes: Sequence[Shape], strides: Sequence[int], finest_scale: float = 56.0
) -> list[Tensor]:
    """Cells inside boxes, each box on one level by its size (DeFeat, section 3).

    A box of w x h pixels belongs to level floor(log2(sqrt(w h) / finest_scale + 1e-6)), clamped to those there are.
    There it covers the cells floor(x1 / stride) up to floor(x2 / stride), end exclusive, within the map; likewise in y.
    A box that meets the map covers at least one cell in each direction, one beside the map covers none.

    Args:
        boxes: [M_i, 4] for each image, M_i = 0 included.
        shapes: (h, w) of each level, finest first.
        strides: input pixels a cell, of each level.
        finest_scale: object side, in pixels, that the first level begins at.

    Returns:
        [N, h, w] bool for each level.
    """
    padded = _padded(boxes)
    return _unions(padded, shapes, strides, _levels(padded, len(shapes), finest_scale))


@torch.no_grad()
def gaussian_masks(
    boxes: Sequence[Tensor], shapes: Sequence[Shape], strides: Sequence[int], finest_scale: float = 56.0
) -> list[Tensor]:
    """A bump on each box, in the cells that `box_masks` marks (TADF, arXiv 2006.13108).

    In a cell whose centre lies dx, dy pixels from the centre of a box of w x h pixels the mask is
    exp(-0.5 (dx / (w / 2))^2) exp(-0.5 (dy / (h / 2))^2), and the largest such value where boxes overlap. A marked cell
    whose centre lies outside the box, as with boxes smaller than a cell, counts as on the box's edge: so small objects
    weigh no less than large ones.

    Args:
        boxes, shapes, strides, finest_scale: as in `box_masks`.

    Returns:
        [N, h, w] for each level, in the dtype of the boxes: 0 outside boxes, within [exp(-1), 1] inside.
    """
    padded = _padded(boxes)
    images, count = padded.shape[:2]
    levels = _levels(padded, len(shapes), finest_scale)
    masks = []
    for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        x1, y1, x2, y2 = padded.unbind(-1)
        across = _squared_offsets(x1, x2, stride, width)
        down = _squared_offsets(y1, y2, stride, height).masked_fill((levels != level)[..., None], torch.inf)
        # The largest product of exponentials is the exponential of the smallest sum: one exp a cell, not one a box.
        smallest = padded.new_full((images, height, width), torch.inf)
        step = max(1, MAX_ELEMENTS // (images * height * width))
        for start in range(0, count, step):
            some = slice(start, start + step)
            sums = down[:, some, :, None] + across[:, some, None, :]
            smallest = torch.minimum(smallest, sums.amin(dim=1))
        masks.append(torch.exp(-0.5 * smallest))
    return masks


@torch.no_grad()
def fine_grained_masks(
    boxes: Sequence[Tensor], shapes: Sequence[Shape], anchors: Sequence[Tensor], ratio: float = 0.5
) -> list[Tensor]:
    """Cells with an anchor that fits some box nearly as well as the best anchor does (FGFI, CVPR 2019).

    A cell is foreground where the IoU of any of its anchors with any box exceeds `ratio` times that box's best IoU over
    the anchors of all levels: a box is on the levels whose anchors fit it.

    Args:
        boxes, shapes: as in `box_masks`.
        anchors: [h * w * A, 4] for each level, xyxy pixels, cells row by row and the A anchors of a cell together.
        ratio: share of the best IoU that has to be exceeded, in [0, 1].

    Returns:
        [N, h, w] bool for each level.
    """
    padded = _padded(boxes)
    every_anchor = torch.cat(list(anchors))
    fits = torch.zeros(len(padded), len(every_anchor), dtype=torch.bool, device=padded.device)
    at_once = IN_CACHE if padded.device.type == "cpu" else MAX_ELEMENTS
    few = max(1, at_once // len(every_anchor))
    overlaps = _Overlaps(every_anchor, padded.dtype)
    for images, fit in zip(padded.split(few), fits.split(few), strict=True):
        for some in images.split(max(1, few // len(images)), dim=1):
            found = overlaps(some)
            fit |= (found > ratio * found.amax(dim=2, keepdim=True)).any(dim=1)
    by_level = fits.split([len(of_level) for of_level in anchors], dim=1)
    return [fit.unflatten(1, (*shape, -1)).any(dim=-1) for fit, shape in zip(by_level, shapes, strict=True)]


@torch.no_grad()
def full_masks(boxes: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    """True everywhere: one weight for the whole map. Returns [N, h, w] bool for each level."""
    return [torch.ones(len(boxes), *shape, dtype=torch.bool, device=boxes[0].device) for shape in shapes]


@torch.no_grad()
def backbone_masks(boxes: Sequence[Tensor], shapes: Sequence[Shape], strides: Sequence[int]) -> list[Tensor]:
    """Cells inside any box, whatever its size: drawn at stride 4, then resized (nearest) to each stage.

    Args:
        boxes: as in `box_masks`.
        shapes, strides: of the backbone stages, finest first.

    Returns:
        [N, h, w] bool for each stage.
    """
    height, width = (cells * strides[0] // BACKBONE_MASK_STRIDE for cells in shapes[0])
    padded = _padded(boxes)
    (finest,) = _unions(padded, [(height, width)], [BACKBONE_MASK_STRIDE], torch.zeros_like(padded[..., 0]))
    masks = []
    for h, w in shapes:
        rows = torch.arange(h, device=finest.device) * height // h
        columns = torch.arange(w, device=finest.device) * width // w
        masks.append(finest[:, rows[:, None], columns])
    return masks


@torch.no_grad()
def focal_masks(
    boxes: Sequence[Tensor], shapes: Sequence[Shape], strides: Sequence[int], valid: Sequence[Tensor] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Weights that let every object count alike, and the background as much as one (FGD, arXiv 2111.11837).

        fg = largest over the boxes on a cell of 1 / (rows columns),  bg = 1 / (cells outside all boxes)

    A box covers the cells that `box_masks` gives it, on every level, and rows and columns are those on the map. FGD's
    published code differs where it errs: its boxes are a cell too large at right and bottom, stretched in batches with
    padding, and lost where a corner is negative; its background includes the padding.

    Args:
        boxes, shapes, strides: as in `box_masks`.
        valid: [N, h, w] bool for each level; cells that are False weigh nothing. None takes all.

    Returns:
        fg and bg, [N, h, w] each, for each level: every box's cells weigh 1 together where no smaller box covers
        them; an image's background weighs 1 together, or 0 where it has none.
    """
    padded = _padded(boxes)
    images, count = padded.shape[:2]
    x1, y1, x2, y2 = padded.unbind(-1)
    masks = []
    for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        rows, columns = _spans(y1, y2, stride, height), _spans(x1, x2, stride, width)
        area = rows.sum(dim=2) * columns.sum(dim=2)
        weighted_rows = rows.to(padded.dtype) / area.clamp(min=1)[..., None]
        fg = padded.new_zeros(images, height, width)
        step = max(1, MAX_ELEMENTS // (images * height * width))
        for start in range(0, count, step):
            some = slice(start, start + step)
            fg = torch.maximum(fg, (weighted_rows[:, some, :, None] * columns[:, some, None, :]).amax(dim=1))
        outside = fg == 0
        if valid is not None:
            fg, outside = fg * valid[level], outside & valid[level]
        outside = outside.to(fg.dtype)
        masks.append((fg, outside / outside.sum(dim=(1, 2), keepdim=True).clamp(min=1)))
    return masks


def valid_masks(valid: Tensor, shapes: Sequence[Shape], strides: Sequence[int] | None = None) -> list[Tensor]:
    """Cells in each image's own area, not in the padding of the batch.

    A cell is valid where its first pixel is: `row * stride < height` and `column * stride < width` of the image.

    Args:
        valid: [N, H, W] bool, as `Batch.valid`.
        shapes: (h, w) of each level.
        strides: of each level; None takes the powers of two that give these shapes, rounded up, from H and W.

    Returns:
        [N, h, w] bool for each level, views of `valid`.

    Raises:
        ValueError: a level has more cells than the input has pixels for, at its stride.
    """
    masks = []
    for level, (h, w) in enumerate(shapes):
        if strides is None:
            down, across = (
                _power_of_two_stride(side, cells) for side, cells in zip(valid.shape[1:], (h, w), strict=True)
            )
        else:
            down = across = strides[level]
        mask = valid[:, ::down, ::across][:, :h, :w]
        if mask.shape[1:] != (h, w):
            raise ValueError(
                f"level {level} of {h} x {w} cells is no map of {tuple(valid.shape[1:])} pixels; give strides"
            )
        masks.append(mask)
    return masks


def _power_of_two_stride(pixels: int, cells: int) -> int:
    """The smallest power of two that needs no more than so many cells for so many pixels."""
    return 1 << (-(-pixels // cells) - 1).bit_length()


def _padded(boxes: Sequence[Tensor]) -> Tensor:
    """[N, M, 4] at least float32, filled up with empty boxes beside the map, which mark nothing."""
    padded = pad_sequence([b.reshape(-1, 4) for b in boxes], batch_first=True, padding_value=-1)
    return padded.to(torch.promote_types(padded.dtype, torch.float32))


def _levels(boxes: Tensor, count: int, finest_scale: float) -> Tensor:
    """Level of each box, as whole numbers in the dtype of the boxes: [N, M, 4] -> [N, M]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    side = ((x2 - x1) * (y2 - y1)).sqrt()
    return torch.floor(torch.log2(side / finest_scale + 1e-6)).clamp(0, count - 1)


class _Overlaps:
    """IoU of boxes with anchors, as torchvision's `box_iou` rounds it: [N, M, 4] -> [N, M, K].

    It takes one coordinate after another, each in one piece of memory, and writes to memory that it has had before:
    fresh memory takes a CPU longer than the arithmetic. So each call overwrites what the last one gave.
    """

    def __init__(self, anchors: Tensor, dtype: torch.dtype) -> None:
        self.left, self.top, self.right, self.bottom = anchors.T.contiguous()
        self.areas = (self.right - self.left) * (self.bottom - self.top)
        self.memory = anchors.new_empty(0, dtype=torch.promote_types(anchors.dtype, dtype))

    def __call__(self, boxes: Tensor) -> Tensor:
        shape = (*boxes.shape[:2], len(self.left))
        if self.memory.shape[1:] != shape:
            self.memory = self.memory.new_empty(3, *shape)
        width, height, spare = self.memory
        x1, y1, x2, y2 = (side[..., None] for side in boxes.unbind(-1))
        torch.minimum(x2, self.right, out=width).sub_(torch.maximum(x1, self.left, out=spare)).clamp_(min=0)
        torch.minimum(y2, self.bottom, out=height).sub_(torch.maximum(y1, self.top, out=spare)).clamp_(min=0)
        shared = width.mul_(height)
        union = torch.add((x2 - x1) * (y2 - y1), self.areas, out=spare).sub_(shared)
        return shared.div_(union)


def _spans(low: Tensor, high: Tensor, stride: int, cells: int) -> Tensor:
    """Cells of one axis between two edges in pixels: [N, M] each -> [N, M, cells] bool."""
    first, end = _ends(low, high, stride)
    return _between(first, end, cells)


def _ends(low: Tensor, high: Tensor, stride: int | Tensor) -> tuple[Tensor, Tensor]:
    """First cell and the one behind the last, on a map that begins with cell 0 and has no end: in the dtype of the
    edges. An extent that ends before the map has an end of 0."""
    first = torch.floor(low / stride).clamp(min=0)
    end = torch.floor(high / stride)
    return first, torch.maximum(end, first + 1).where(end >= 0, 0)


def _between(first: Tensor, end: Tensor, cells: int) -> Tensor:
    """[N, M] each -> [N, M, cells] bool, True from `first` up to `end`, which is left out."""
    cell = torch.arange(cells, device=first.device, dtype=first.dtype)
    return (cell >= first[..., None]).logical_and_(cell < end[..., None])


def _unions(boxes: Tensor, shapes: Sequence[Shape], strides: Sequence[int], levels: Tensor) -> list[Tensor]:
    """Cells inside any box, each box on its level: [N, M, 4], [N, M] -> [N, h, w] bool for each level.

    The rows of all levels stand in one line, and so do the columns, so that a box is compared with cells once.
    """
    on_a_level = levels >= 0  # not a number where a side is negative, or none itself: such a box marks nothing
    index = levels.nan_to_num(0.0).long()
    stride = _filled(strides, boxes)[index]
    x1, y1, x2, y2 = boxes.unbind(-1)
    lines = []
    for axis, (low, high) in enumerate(((y1, y2), (x1, x2))):
        cells = [shape[axis] for shape in shapes]
        first, end = _ends(low, high, stride)
        end = end.where(on_a_level, 0)
        starts = [0, *accumulate(cells)]
        start, behind = _filled(starts[:-1], boxes)[index], _filled(starts[1:], boxes)[index]
        spans = _between(first + start, torch.minimum(end + start, behind), starts[-1])
        lines.append([line.split(cells, dim=1) for line in _packed(spans)])
    masks = []
    for level, shape in enumerate(shapes):
        covered = torch.zeros(len(boxes), *shape, dtype=torch.uint8, device=boxes.device)
        for rows, columns in zip(*lines, strict=True):
            covered |= rows[level][:, :, None] & columns[level][:, None, :]
        masks.append(covered.clamp_(max=1).view(torch.bool))
    return masks


def _filled(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor, without the copy from the host that a GPU would wait for."""
    return torch.cat([like.new_full((1,), value) for value in values])


def _packed(spans: Tensor) -> tuple[Tensor, ...]:
    """Eight boxes in the bits of a byte: [N, M, cells] bool -> as many [N, cells] uint8 as M boxes take.

    One operation on bytes then does for eight boxes what it would do for one.
    """
    images, count, cells = spans.shape
    padded = spans.new_zeros(images, -(-count // 8) * 8, cells, dtype=torch.uint8)
    padded[:, :count] = spans
    bits = 1 << torch.arange(8, device=spans.device, dtype=torch.uint8)
    return (padded.unflatten(1, (-1, 8)) * bits[:, None]).sum(dim=2, dtype=torch.uint8).unbind(dim=1)


def _squared_offsets(low: Tensor, high: Tensor, stride: int, cells: int) -> Tensor:
    """((x - cx) / (w / 2))^2 of one axis, at most 1 inside a box and infinite outside: [N, M] -> [N, M, cells]."""
    centres = (torch.arange(cells, device=low.device, dtype=low.dtype) + 0.5) * stride
    half = ((high - low) / 2).clamp(min=torch.finfo(low.dtype).tiny)
    offsets = (centres - ((low + high) / 2)[..., None]).abs() / half[..., None]
    return offsets.clamp(max=1).square().masked_fill(~_spans(low, high, stride, cells), torch.inf)


MASKS: dict[str, Callable[..., list[Tensor]]] = {
    "boxes": lambda boxes, shapes, strides, finest_scale, anchors: box_masks(boxes, shapes, strides, finest_scale),
    "gaussian": lambda boxes, shapes, strides, finest_scale, anchors: gaussian_masks(
        boxes, shapes, strides, finest_scale
    ),
    "fine-grained": lambda boxes, shapes, strides, finest_scale, anchors: fine_grained_masks(boxes, shapes, anchors),
    "full": lambda boxes, shapes, strides, finest_scale, anchors: full_masks(boxes, shapes),
}
"""Mask kind -> masks from (boxes, shapes, strides, finest_scale, anchors); only `fine-grained` needs the anchors."""
