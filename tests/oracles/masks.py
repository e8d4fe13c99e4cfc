"""Masks the slow way: one box and one cell at a time, in Python numbers, straight from the definitions."""

from __future__ import annotations

import math


def level_of(box, levels, finest_scale=56.0):
    x1, y1, x2, y2 = box
    level = math.floor(math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / finest_scale + 1e-6))
    return min(max(level, 0), levels - 1)


def cells_between(low, high, stride, cells):
    """Indices of the cells that an extent covers: at least one of those on the map, unless it lies beside the map."""
    first, end = math.floor(low / stride), math.floor(high / stride)
    if end < 0 or first >= cells:
        return []
    first = max(first, 0)
    end = max(end, first + 1)
    return [i for i in range(first, end) if i < cells]


def grid(shape, value):
    return [[value] * shape[1] for _ in range(shape[0])]


def box_masks(boxes, shapes, strides, finest_scale=56.0):
    """boxes: per image, a list of 4 numbers each -> [level][image][row][column] of True or False."""
    masks = []
    for level, (shape, stride) in enumerate(zip(shapes, strides, strict=True)):
        masks.append([])
        for of_image in boxes:
            mask = grid(shape, False)
            for box in of_image:
                if level_of(box, len(shapes), finest_scale) == level:
                    for y in cells_between(box[1], box[3], stride, shape[0]):
                        for x in cells_between(box[0], box[2], stride, shape[1]):
                            mask[y][x] = True
            masks[-1].append(mask)
    return masks


def gaussian_masks(boxes, shapes, strides, finest_scale=56.0):
    masks = []
    for level, (shape, stride) in enumerate(zip(shapes, strides, strict=True)):
        masks.append([])
        for of_image in boxes:
            mask = grid(shape, 0.0)
            for box in of_image:
                if level_of(box, len(shapes), finest_scale) != level:
                    continue
                for y in cells_between(box[1], box[3], stride, shape[0]):
                    for x in cells_between(box[0], box[2], stride, shape[1]):
                        px, py = (x + 0.5) * stride, (y + 0.5) * stride
                        value = bump(px, box[0], box[2]) * bump(py, box[1], box[3])
                        mask[y][x] = max(mask[y][x], value)
            masks[-1].append(mask)
    return masks


def bump(x, low, high):
    """1 in the middle, exp(-1/2) on the edges, and no less beyond them."""
    if x == (low + high) / 2:
        return 1.0
    if x <= low or x >= high:
        return math.exp(-0.5)
    return math.exp(-0.5 * ((x - (low + high) / 2) / ((high - low) / 2)) ** 2)


def fine_grained_masks(boxes, shapes, anchors, ratio=0.5):
    """anchors: per level a list of 4 numbers each, the anchors of a cell together, cells row by row."""
    bests = [[max(iou(box, anchor) for level in anchors for anchor in level) for box in of_image] for of_image in boxes]
    masks = []
    for (height, width), of_level in zip(shapes, anchors, strict=True):
        each = len(of_level) // (height * width)
        masks.append([])
        for of_image, best_of_image in zip(boxes, bests, strict=True):
            mask = grid((height, width), False)
            for box, best in zip(of_image, best_of_image, strict=True):
                for y in range(height):
                    for x in range(width):
                        start = (y * width + x) * each
                        for anchor in of_level[start : start + each]:
                            if iou(box, anchor) > ratio * best:
                                mask[y][x] = True
            masks[-1].append(mask)
    return masks


def iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def backbone_masks(boxes, shapes, strides):
    """All boxes at stride 4 on one map; a cell of another size looks up the one that its place corresponds to."""
    height, width = shapes[0][0] * strides[0] // 4, shapes[0][1] * strides[0] // 4
    masks = []
    for h, w in shapes:
        masks.append([])
        for of_image in boxes:
            finest = grid((height, width), False)
            for box in of_image:
                for y in cells_between(box[1], box[3], 4, height):
                    for x in cells_between(box[0], box[2], 4, width):
                        finest[y][x] = True
            masks[-1].append([[finest[y * height // h][x * width // w] for x in range(w)] for y in range(h)])
    return masks


def valid_masks(sizes, shapes, strides):
    """sizes: (height, width) of each image."""
    return [
        [[[y * stride < height and x * stride < width for x in range(w)] for y in range(h)] for height, width in sizes]
        for (h, w), stride in zip(shapes, strides, strict=True)
    ]
