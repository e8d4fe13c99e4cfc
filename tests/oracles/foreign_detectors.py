"""mmdetection's and detectron2's detectors, written out: the names of their weights, and what they compute.

Everything works on the original names and layouts with plain functions, so that it shares nothing with the conversion
that it checks. `STYLES` says where the libraries differ.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, roi_align

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


@dataclass(frozen=True)
class Style:
    """Names and conventions of a library. `{}` in a name takes a stage (1 to 4), block and convolution."""

    stem: str
    stem_norm: str
    conv: str
    norm: str
    shortcut: str
    shortcut_norm: str
    counters: bool  # BatchNorm's num_batches_tracked is in the state dict
    stride_in_1x1: bool
    bgr: bool
    mean: tuple[float, float, float]  # in the channel order of the input, pixels in 0-255
    std: tuple[float, float, float]
    relu_before_p7: bool
    sizes_first: bool


MMDET = Style(
    "backbone.conv1",
    "backbone.bn1",
    "backbone.layer{}.{}.conv{}",
    "backbone.layer{}.{}.bn{}",
    "backbone.layer{}.{}.downsample.0",
    "backbone.layer{}.{}.downsample.1",
    counters=True,
    stride_in_1x1=False,
    bgr=False,
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    relu_before_p7=False,
    sizes_first=False,
)
MMDET_CAFFE = Style(
    *(MMDET.stem, MMDET.stem_norm, MMDET.conv, MMDET.norm, MMDET.shortcut, MMDET.shortcut_norm),
    counters=True,
    stride_in_1x1=True,
    bgr=True,
    mean=(103.53, 116.28, 123.675),
    std=(1.0, 1.0, 1.0),
    relu_before_p7=False,
    sizes_first=False,
)
DETECTRON2 = Style(
    "backbone.bottom_up.stem.conv1",
    "backbone.bottom_up.stem.conv1.norm",
    "backbone.bottom_up.res{}.{}.conv{}",
    "backbone.bottom_up.res{}.{}.conv{}.norm",
    "backbone.bottom_up.res{}.{}.shortcut",
    "backbone.bottom_up.res{}.{}.shortcut.norm",
    counters=False,
    stride_in_1x1=True,
    bgr=True,
    mean=(103.53, 116.28, 123.675),
    std=(1.0, 1.0, 1.0),
    relu_before_p7=True,
    sizes_first=True,
)


@dataclass(frozen=True)
class Settings:
    """What a configuration decides, by the plain meaning of each setting."""

    eps: float = 1e-5
    sampling: int = 0
    aligned: bool = True
    anchor_scale: float = 1.0  # of the usual anchor sides
    sizes_first: bool | None = None  # None: the library's own order
    proposals_before: int = 1000  # of each level
    proposals: int = 1000
    proposal_overlap: float = 0.7
    proposal_side: float = 0.0  # those with a side of this or less are dropped
    proposal_spread: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # deltas are times this, plus the mean
    proposal_mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    spread: tuple[float, ...] | None = None  # None: 0.1 0.1 0.2 0.2 in two stages, ones in one
    mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    clip_proposals: bool = True
    clip: bool = True
    least_score: float = 0.05
    candidates: int = 1000  # of each level, in one stage
    overlap: float = 0.5
    soft: str = ""
    sigma: float = 0.5
    soft_least: float = 1e-3
    across_classes: bool = False
    detections: int = 100


STYLES = {"mmdet": MMDET, "mmdet caffe": MMDET_CAFFE, "detectron2": DETECTRON2}


@dataclass(frozen=True)
class Names:
    """Where a library keeps neck and heads; `{}` takes a level or a layer."""

    lateral: str
    output: str
    p6: str
    p7: str
    rpn: tuple[str, str, str]  # convolution, objectness, deltas
    fc: tuple[str, str]
    box: tuple[str, str]  # class scores, box deltas
    towers: tuple[str, str]  # classification, regression
    dense: tuple[str, str]  # class logits, box deltas


MMDET_NAMES = Names(
    "neck.lateral_convs.{}.conv",
    "neck.fpn_convs.{}.conv",
    "neck.fpn_convs.3.conv",
    "neck.fpn_convs.4.conv",
    ("rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg"),
    ("roi_head.bbox_head.shared_fcs.0", "roi_head.bbox_head.shared_fcs.1"),
    ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"),
    ("bbox_head.cls_convs.{}.conv", "bbox_head.reg_convs.{}.conv"),
    ("bbox_head.retina_cls", "bbox_head.retina_reg"),
)
DETECTRON2_NAMES = Names(
    "backbone.fpn_lateral{}",
    "backbone.fpn_output{}",
    "backbone.top_block.p6",
    "backbone.top_block.p7",
    (
        "proposal_generator.rpn_head.conv",
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
    ),
    ("roi_heads.box_head.fc1", "roi_heads.box_head.fc2"),
    ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"),
    ("head.cls_subnet.{}", "head.bbox_subnet.{}"),
    ("head.cls_score", "head.bbox_pred"),
)


class ForeignDetector:
    """A detector of another library with seeded weights.

    weights: its state dict, by the library's own names.
    """

    def __init__(
        self,
        style: str | Style,
        two_stage: bool,
        *,
        backbone: str = "resnet50",
        fpn: int = 16,
        head: int = 24,
        classes: int = 4,
    ) -> None:
        self.settings = Settings()
        self.style = style if isinstance(style, Style) else STYLES[style]
        self.two_stage, self.backbone, self.classes = two_stage, backbone, classes
        self.detectron2 = self.style.sizes_first
        self.names = DETECTRON2_NAMES if self.detectron2 else MMDET_NAMES
        self.weights = {key: _seeded(key, shape) for key, shape in self.shapes(fpn, head).items()}
        self.weights[f"{self.style.stem}.weight"] *= self.style.std[0] / 58  # pixels in 0-255 come in undivided

    def with_settings(self, **settings: Any) -> ForeignDetector:
        """The same weights under other settings."""
        other = copy.copy(self)
        other.settings = Settings(**settings)
        return other

    # --- names and shapes

    def stage(self, index: int) -> int:
        """The number by which the library calls a stage 1 to 4."""
        return index + 1 if self.detectron2 else index

    def level(self, index: int) -> int:
        """The number by which the library calls an FPN level, counted from its finest."""
        return index + (2 if self.two_stage else 3) if self.detectron2 else index

    def tower(self, index: int) -> int:
        return 2 * index if self.detectron2 else index

    def shapes(self, fpn: int, head: int) -> dict[str, tuple[int, ...]]:
        style, names, shapes = self.style, self.names, {}

        def conv(name: str, outputs: int, inputs: int, size: int, bias: bool = True) -> None:
            shapes[f"{name}.weight"] = (outputs, inputs, size, size)
            if bias:
                shapes[f"{name}.bias"] = (outputs,)

        def norm(name: str, channels: int) -> None:
            for kind in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.{kind}"] = (channels,)
            if style.counters:
                shapes[f"{name}.num_batches_tracked"] = ()

        conv(style.stem, 64, 3, 7, bias=False)
        norm(style.stem_norm, 64)
        bottleneck = self.backbone != "resnet18"
        inputs = 64
        for stage, blocks in enumerate(BLOCKS[self.backbone], start=1):
            width = 32 * 2**stage
            outputs = width * 4 if bottleneck else width
            for block in range(blocks):
                place = (self.stage(stage), block)
                layers = [(width, inputs, 1), (width, width, 3), (outputs, width, 1)]
                for i, (o, c, size) in enumerate(layers if bottleneck else [(width, inputs, 3), (width, width, 3)], 1):
                    conv(style.conv.format(*place, i), o, c, size, bias=False)
                    norm(style.norm.format(*place, i), o)
                if block == 0 and inputs != outputs:
                    conv(style.shortcut.format(*place), outputs, inputs, 1, bias=False)
                    norm(style.shortcut_norm.format(*place), outputs)
                inputs = outputs
        stages = [inputs // 8, inputs // 4, inputs // 2, inputs][0 if self.two_stage else 1 :]
        for i, channels in enumerate(stages):
            conv(names.lateral.format(self.level(i)), fpn, channels, 1)
            conv(names.output.format(self.level(i)), fpn, fpn, 3)
        if self.two_stage:
            conv(names.rpn[0], fpn, fpn, 3)
            conv(names.rpn[1], 3, fpn, 1)
            conv(names.rpn[2], 12, fpn, 1)
            rows = [(names.fc[0], head, fpn * 49), (names.fc[1], head, head)]
            rows += [(names.box[0], self.classes + 1, head), (names.box[1], self.classes * 4, head)]
            for name, outputs, inputs in rows:
                shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)
            return shapes
        conv(names.p6, fpn, stages[-1], 3)
        conv(names.p7, fpn, fpn, 3)
        for tower in names.towers:
            for i in range(4):
                conv(tower.format(self.tower(i)), fpn, fpn, 3)
        conv(names.dense[0], 9 * self.classes, fpn, 3)
        conv(names.dense[1], 36, fpn, 3)
        return shapes

    # --- what it computes

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        kinds = ("weight", "bias", "running_mean", "running_var")
        w, b, mean, var = (self.weights[f"{name}.{kind}"][:, None, None] for kind in kinds)
        return (x - mean) / (var + self.settings.eps).sqrt() * w + b

    def features(self, rgb: Tensor) -> list[Tensor]:
        """FPN features of RGB pixels in [0, 1], [3, H, W], padded to a multiple of 32 after normalisation."""
        style = self.style
        pixels = (rgb.flip(0) if style.bgr else rgb) * 255
        pixels = (pixels - torch.tensor(style.mean)[:, None, None]) / torch.tensor(style.std)[:, None, None]
        height, width = pixels.shape[1:]
        x = F.pad(pixels, (0, -width % 32, 0, -height % 32))[None]
        x = F.max_pool2d(F.relu(self.norm(style.stem_norm, self.conv(style.stem, x, 2))), 3, 2, 1)
        stages = []
        for stage, blocks in enumerate(BLOCKS[self.backbone], start=1):
            for block in range(blocks):
                x = self.block(x, (self.stage(stage), block), 2 if stage > 1 and block == 0 else 1)
            stages.append(x)
        return self.pyramid(stages)

    def block(self, x: Tensor, place: tuple[int, int], stride: int) -> Tensor:
        style, strides = self.style, (stride, 1) if self.style.stride_in_1x1 else (1, stride)
        strides = (*strides, 1) if self.backbone != "resnet18" else (stride, 1)
        y = x
        for i, step in enumerate(strides, start=1):
            y = self.norm(style.norm.format(*place, i), self.conv(style.conv.format(*place, i), y, step))
            y = F.relu(y) if i < len(strides) else y
        shortcut = style.shortcut.format(*place)
        if f"{shortcut}.weight" in self.weights:
            x = self.norm(style.shortcut_norm.format(*place), self.conv(shortcut, x, stride))
        return F.relu(x + y)

    def pyramid(self, stages: list[Tensor]) -> list[Tensor]:
        names, used = self.names, stages if self.two_stage else stages[1:]
        merged = [self.conv(names.lateral.format(self.level(i)), stage) for i, stage in enumerate(used)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], scale_factor=2, mode="nearest")
        outputs = [self.conv(names.output.format(self.level(i)), m) for i, m in enumerate(merged)]
        if self.two_stage:
            return [*outputs, outputs[-1][:, :, ::2, ::2]]
        p6 = self.conv(names.p6, stages[-1], 2)
        return [*outputs, p6, self.conv(names.p7, F.relu(p6) if self.style.relu_before_p7 else p6, 2)]

    def anchors(self, features: list[Tensor]) -> list[Tensor]:
        """[h w A, 4] a level."""
        return [_grid(self.cell(level), f.shape[-2:], self.stride(level)) for level, f in enumerate(features)]

    def stride(self, level: int) -> int:
        return (4 if self.two_stage else 8) * 2**level

    def cell(self, level: int) -> list[tuple[float, float]]:
        """(width, height) of the anchors of one cell."""
        base = 32 * 2**level * self.settings.anchor_scale
        sizes = [base] if self.two_stage else [base * 2 ** (i / 3) for i in range(3)]
        ratios = [0.5, 1.0, 2.0]
        pairs = [(size, ratio) for ratio in ratios for size in sizes]
        sizes_first = self.style.sizes_first if self.settings.sizes_first is None else self.settings.sizes_first
        if sizes_first:
            pairs = [(size, ratio) for size in sizes for ratio in ratios]
        return [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for size, ratio in pairs]

    def rpn(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [F.relu(self.conv(self.names.rpn[0], f)) for f in features]
        return [self.conv(self.names.rpn[1], h) for h in hidden], [self.conv(self.names.rpn[2], h) for h in hidden]

    def proposals(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """[P, 4]: the best of each level, clipped, suppressed level by level, the best of those."""
        told = self.settings
        boxes, scores, levels = [], [], []
        for level, (logits, deltas, anchors) in enumerate(
            zip(*self.rpn(features), self.anchors(features), strict=True)
        ):
            flat = logits[0].permute(1, 2, 0).flatten()
            best = flat.sort(descending=True, stable=True).indices[: told.proposals_before]
            deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)[best]
            deltas = deltas * torch.tensor(told.proposal_spread) + torch.tensor(told.proposal_mean)
            boxes.append(self.decoded(deltas, anchors[best]))
            scores.append(flat[best])
            levels.append(torch.full_like(best, level))
        boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        boxes = _clipped(boxes, size) if told.clip_proposals else boxes
        solid = ((boxes[:, 2:] - boxes[:, :2]) > told.proposal_side).all(1)
        boxes, scores, levels = boxes[solid], scores[solid], levels[solid]
        return boxes[batched_nms(boxes, scores, levels, told.proposal_overlap)[: told.proposals]]

    def decoded(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes moved by deltas, [R, 4]."""
        centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        limit = math.log(1000 / 16)
        grown = side * deltas[:, 2:].clamp(-limit if not self.detectron2 else None, limit).exp()
        moved = centre + deltas[:, :2] * side
        return torch.cat([moved - grown / 2, moved + grown / 2], dim=1)

    def box_head(self, features: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores [R, K + 1], background last, and box deltas [R, 4 K], of given boxes."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.log2(side / 56 + 1e-6).floor().clamp(0, 3)
        pooled = torch.zeros(len(boxes), features[0].shape[1], 7, 7)
        for i in range(4):
            chosen = level == i
            pooled[chosen] = roi_align(
                features[i], [boxes[chosen]], 7, 1 / (4 * 2**i), self.settings.sampling, self.settings.aligned
            )
        hidden = pooled.flatten(1)
        for name in self.names.fc:
            hidden = F.relu(F.linear(hidden, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]))
        linear = [F.linear(hidden, self.weights[f"{n}.weight"], self.weights[f"{n}.bias"]) for n in self.names.box]
        return linear[0], linear[1]

    def dense(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits [h w A, K] and box deltas [h w A, 4] a level."""
        outputs: list[list[Tensor]] = []
        for tower, last, columns in zip(self.names.towers, self.names.dense, (self.classes, 4), strict=True):
            maps = []
            for x in features:
                for i in range(4):
                    x = F.relu(self.conv(tower.format(self.tower(i)), x))
                maps.append(self.conv(last, x)[0].permute(1, 2, 0).reshape(-1, columns))
            outputs.append(maps)
        return outputs[0], outputs[1]

    def detections(self, rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [D, 4], scores [D] and classes [D] from 0, best first."""
        features, size, told = self.features(rgb), tuple(rgb.shape[1:]), self.settings
        spread = torch.tensor(told.spread or ((0.1, 0.1, 0.2, 0.2) if self.two_stage else (1.0,) * 4))
        mean = torch.tensor(told.mean)
        if self.two_stage:
            regions = self.proposals(features, size)
            scores, deltas = self.box_head(features, regions)
            scores = scores.softmax(1)[:, :-1]
            regions = regions[:, None].expand(-1, self.classes, -1).reshape(-1, 4)
            boxes = self.decoded(deltas.reshape(-1, 4) * spread + mean, regions)
            boxes = (_clipped(boxes, size) if told.clip else boxes).reshape(-1, self.classes, 4)
            index, classes = (scores > told.least_score).nonzero().unbind(1)
            return self.finished(*self.suppressed(boxes[index, classes], scores[index, classes], classes))
        kept = []
        for logits, deltas, anchors in zip(*self.dense(features), self.anchors(features), strict=True):
            scores = logits.sigmoid()
            index, classes = (scores > told.least_score).nonzero().unbind(1)
            best = scores[index, classes].sort(descending=True, stable=True).indices[: told.candidates]
            index, classes = index[best], classes[best]
            kept.append((self.decoded(deltas[index] * spread + mean, anchors[index]), scores[index, classes], classes))
        boxes, scores, classes = (torch.cat(part) for part in zip(*kept, strict=True))
        if self.detectron2:
            boxes, scores, classes = self.suppressed(boxes, scores, classes)
            return self.finished(_clipped(boxes, size), scores, classes)
        boxes = _clipped(boxes, size) if told.clip else boxes
        solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
        return self.suppressed(boxes[solid], scores[solid], classes[solid])

    def suppressed(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        told = self.settings
        groups = torch.zeros_like(classes) if told.across_classes else classes
        if told.soft:
            keep, scores = _softly_suppressed(boxes, scores, groups, told)
        else:
            keep = batched_nms(boxes, scores, groups, told.overlap)
            scores = scores[keep]
        return boxes[keep[: told.detections]], scores[: told.detections], classes[keep[: told.detections]]

    def finished(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """detectron2 drops boxes without area at the very end."""
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1) | (not self.detectron2)
        return boxes[kept], scores[kept], classes[kept]


def _seeded(key: str, shape: tuple[int, ...]) -> Tensor:
    """Weights that depend on the key alone and keep activations of the size of 1 to 10."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(9)
    generator = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(key)))
    noise = torch.randn(shape, generator=generator)
    if key.endswith("running_var"):
        return 1 + 0.3 * noise.abs()
    if key.endswith("running_mean") or (key.endswith("bias") and len(shape) == 1):
        return 0.1 * noise
    if len(shape) == 1:  # the scale of a norm; small at the end of a block, so that depth does not blow up
        return (0.3 if ".bn3." in key or ".conv3.norm." in key else 1.0) * (1 + 0.1 * noise)
    fan_in = math.prod(shape[1:])
    small = {
        0.1: ("fc_cls", "box_predictor.cls_score"),
        0.2: ("lateral",),
        0.3: ("_reg.", "bbox_pred", "anchor_deltas"),
    }  # scores and deltas that spread, not saturate
    gain = next((gain for gain, parts in small.items() if any(part in key for part in parts)), 1.4)
    return noise * gain / math.sqrt(fan_in)


def _grid(cell: list[tuple[float, float]], shape: tuple[int, int], stride: int) -> Tensor:
    rows = [
        [x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2]
        for y in range(shape[0])
        for x in range(shape[1])
        for w, h in cell
    ]
    return torch.tensor(rows)


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    return torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height], dtype=boxes.dtype))


def _softly_suppressed(boxes: Tensor, scores: Tensor, groups: Tensor, told: Settings) -> tuple[Tensor, Tensor]:
    """mmcv's loop: take the best box, lower the scores of the others by their overlap with it, drop those too low."""
    corners, scores, groups = boxes.tolist(), scores.tolist(), groups.tolist()
    waiting, taken = list(range(len(scores))), []
    while waiting:
        best = max(waiting, key=scores.__getitem__)
        waiting.remove(best)
        taken.append(best)
        for other in list(waiting):
            overlap = _overlap(corners[best], corners[other]) if groups[best] == groups[other] else 0.0
            if told.soft == "gaussian":
                scores[other] *= math.exp(-(overlap**2) / told.sigma)
            elif overlap >= told.overlap:
                scores[other] *= 1 - overlap
            if scores[other] < told.soft_least:
                waiting.remove(other)
    return torch.tensor(taken, dtype=torch.int64), torch.tensor([scores[i] for i in taken])


def _overlap(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (areas - shared) if areas > shared else 0.0
