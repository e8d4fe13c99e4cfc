"""What conversions from other libraries share: renaming by a key table, class order, channel order of the input.

mmdetection and detectron2 agree in most of what sets them apart from torchvision: the background is the last class or,
in one-stage detectors, has no column; it has no box deltas; many models are trained on BGR pixels in 0-255.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from defeat_cli.checkpoints.torchvision import coco_classes
from defeat_cli.checkpoints.weights import StateDict
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.errors import CheckpointError

KeyTable = list[tuple[str, str]]
"""Rows of (pattern, replacement). A key that a pattern matches as a whole is renamed; the first such row counts."""

CLASS_SCORES = "roi_heads.box_predictor.cls_score"
BOX_DELTAS = "roi_heads.box_predictor.bbox_pred"
RPN_SCORES = "rpn.head.cls_logits"
RPN_DELTAS = "rpn.head.bbox_pred"
HIDDEN = "roi_heads.box_head.fc7"
P6 = "backbone.fpn.extra_blocks.p6"
CLASS_LOGITS = "head.classification_head.cls_logits"
ANCHOR_DELTAS = "head.regression_head.bbox_reg"

USUAL_STDS = {
    RPN_DELTAS: [1.0, 1.0, 1.0, 1.0],
    BOX_DELTAS: [0.1, 0.1, 0.2, 0.2],
    ANCHOR_DELTAS: [1.0, 1.0, 1.0, 1.0],
}
"""What torchvision multiplies the deltas of a layer with: one over its box coder's weights."""

NEVER = -100.0
"""Logit of a column that must never win: its sigmoid is 0 in float32."""


@dataclass(frozen=True)
class Tables:
    """How one family of a library is renamed.

    keys: names that become torchvision's.
    dropped: patterns of names that are left out knowingly, with what they are.
    refused: patterns of names of parts that torchvision's detectors do not have, with what they are.
    """

    keys: KeyTable
    dropped: KeyTable
    refused: KeyTable


@dataclass(frozen=True)
class Inputs:
    """What becomes of an image on its way into a network.

    mean, std: of pixels in 0-255, in the channel order of the network.
    is_rgb: the network takes RGB, not BGR.
    scale: (width, height) that images are resized to; None where it is not said.
    keep_ratio: they are resized into `scale` at their own ratio, either way round, and not stretched to it.
    """

    mean: list[float]
    std: list[float]
    is_rgb: bool
    scale: tuple[int, int] | None
    keep_ratio: bool = True

    @property
    def conventions(self) -> dict[str, Any]:
        """The same as settings of `Conventions`, for a network whose first convolution takes RGB."""
        order = 1 if self.is_rgb else -1
        mean, std = unit_range(self.mean[::order]), unit_range(self.std[::order])
        return {"image_mean": mean, "image_std": std, "keep_ratio": self.keep_ratio}


def says_other_pixels(said: Conventions, is_rgb: bool) -> bool:
    """Whether the caller gives another channel order than the usual one, or mean, std and stride with it."""
    stock = Conventions()
    given = any(getattr(said, name) != getattr(stock, name) for name in ("image_mean", "image_std", "stride_in_1x1"))
    return said.channels is not None and (given or (said.channels == "rgb") != is_rgb)


def pixels_as_said(inputs: Inputs, said: Conventions, origin: str, *, known: bool) -> Inputs:
    """`inputs` with the channel order, mean and std that the caller gives, where the checkpoint does not say them.

    Args:
        known: the checkpoint says what `inputs` holds.

    Raises:
        CheckpointError: the caller contradicts the checkpoint.
    """
    if said.channels is None:
        return inputs
    is_rgb = said.channels == "rgb"
    if known and is_rgb != inputs.is_rgb:
        order = "RGB" if inputs.is_rgb else "BGR"
        raise CheckpointError(f"{origin}: conventions.channels is {said.channels}, but it was trained on {order}")
    if known or not says_other_pixels(said, inputs.is_rgb):
        return inputs
    order = 1 if is_rgb else -1
    mean, std = ([255 * value for value in values[::order]] for values in (said.image_mean, said.image_std))
    return replace(inputs, mean=mean, std=std, is_rgb=is_rgb)


def guessed_classes(classes: int) -> tuple[list[str] | None, list[str]]:
    """Class names where a file has none, COCO's if there are 80 classes; and a note that says so."""
    if classes != 80:
        return None, []
    return coco_classes(classes), ["assumed, for the file does not name its classes: COCO's 80, in COCO's order"]


def as_said(built: Architecture, said: Conventions) -> Architecture:
    """The architecture with the channel order that the caller gave, which it was read with."""
    return replace(built, conventions=replace(built.conventions, channels=said.channels))


def assumptions(built: Architecture, is_rgb: bool, short_side: int, long_side: int, why: str) -> list[str]:
    """One line on each thing that is taken for granted, but for thresholds and anchors."""
    conventions = built.conventions
    mean, std = ([round(255 * value, 3) for value in v] for v in (conventions.image_mean, conventions.image_std))
    assumed = [
        f"{'RGB' if is_rgb else 'BGR'} pixels, red to blue less {mean} and over {std}"
        + ("" if conventions.channels else "; conventions.channels can say otherwise"),
        f"images of {short_side} pixels, {long_side} at most",
    ]
    if built.backbone not in ("resnet18", "resnet34"):
        assumed.append(f"bottlenecks that stride in their {'1x1' if conventions.stride_in_1x1 else '3x3'} convolution")
    return [f"assumed, for {why}: {what}" for what in assumed]


def renamed(state_dict: StateDict, tables: Tables, origin: str) -> tuple[StateDict, list[str]]:
    """The state dict by torchvision's names, and a note on each kind of name that was dropped.

    Raises:
        CheckpointError: names a part that cannot be represented, or a key that no table knows.
    """
    result: StateDict = {}
    dropped: dict[str, int] = {}
    refused: dict[str, list[str]] = {}
    for key, value in state_dict.items():
        row = next(((p, to) for p, to in tables.keys if re.fullmatch(p, key)), None)
        if row is not None:
            result[re.fullmatch(row[0], key).expand(row[1])] = value
            continue
        what = next((what for pattern, what in tables.dropped if re.fullmatch(pattern, key)), None)
        if what is not None:
            dropped[what] = dropped.get(what, 0) + 1
            continue
        part = next((part for pattern, part in tables.refused if re.fullmatch(pattern, key)), "an unknown part")
        refused.setdefault(part, []).append(key)
    if refused:
        parts = [
            f"{part}: {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else "") for part, keys in refused.items()
        ]
        raise CheckpointError("\n  ".join([f"{origin}: a detector that cannot be represented here. It has", *parts]))
    return result, [f"dropped: {what} ({count})" for what, count in dropped.items()]


def require_whole(state_dict: StateDict, two_stage: bool, origin: str) -> None:
    """Make sure that a renamed state dict has every part of a detector; whether a part is whole is for strict loading.

    Raises:
        CheckpointError: names the parts that are missing.
    """
    heads = [RPN_SCORES, HIDDEN, CLASS_SCORES, BOX_DELTAS] if two_stage else [P6, CLASS_LOGITS, ANCHOR_DELTAS]
    parts = ["backbone.fpn.layer_blocks.0.0", *heads]
    names = ["backbone.body.conv1.weight", "backbone.body.layer1.0.conv2.weight"]
    names += [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise CheckpointError(
            f"{origin}: half a detector ({'Faster R-CNN' if two_stage else 'RetinaNet'}): nothing in it can become "
            f"{', '.join(missing)}"
        )


def resnet_keys(prefix: str) -> KeyTable:
    """A ResNet with torchvision's names inside (mmdetection's), at `prefix`, a pattern."""
    statistics = "weight|bias|running_mean|running_var"
    block = rf"conv[123]\.weight|bn[123]\.(?:{statistics})|downsample\.0\.weight|downsample\.1\.(?:{statistics})"
    return [
        (rf"{prefix}(conv1\.weight|bn1\.(?:{statistics}))", r"backbone.body.\1"),
        (rf"{prefix}(layer[1-4]\.\d+\.(?:{block}))", r"backbone.body.\1"),
    ]


def with_background_first(state_dict: StateDict, origin: str) -> int:
    """Give the class and box layers of a renamed state dict torchvision's layout, in place.

    Two-stage: softmax columns `[classes, background]` become `[background, classes]`; box deltas, which exist for
    classes only (or once for all), get a background block of zeros in front. One-stage: K sigmoid columns an anchor
    become K + 1, of which the first is never used.

    Returns:
        K, the number of classes.
    """
    if CLASS_SCORES + ".bias" in state_dict:
        classes = len(state_dict[CLASS_SCORES + ".bias"]) - 1
        for kind in ("weight", "bias"):
            scores, deltas = state_dict[f"{CLASS_SCORES}.{kind}"], state_dict[f"{BOX_DELTAS}.{kind}"]
            if len(deltas) not in (4, 4 * classes):
                raise CheckpointError(
                    f"{origin}: {len(deltas)} box deltas for {classes + 1} class scores: expected 4 for each class "
                    "but the background, which comes last"
                )
            state_dict[f"{CLASS_SCORES}.{kind}"] = background_to_front(scores)
            state_dict[f"{BOX_DELTAS}.{kind}"] = deltas_with_background(deltas, classes)
        return classes
    anchors = len(state_dict[ANCHOR_DELTAS + ".bias"]) // 4
    classes = len(state_dict[CLASS_LOGITS + ".bias"]) // anchors
    for kind, fill in (("weight", 0.0), ("bias", NEVER)):
        state_dict[f"{CLASS_LOGITS}.{kind}"] = with_unused_column(state_dict[f"{CLASS_LOGITS}.{kind}"], anchors, fill)
    return classes


def require_anchors(state_dict: StateDict, sizes: list[list[float]], ratios: list[float], origin: str) -> None:
    """Make sure that a renamed state dict scores as many anchors a cell as its configuration has.

    Raises:
        CheckpointError: names both numbers.
    """
    two_stage = CLASS_SCORES + ".bias" in state_dict
    found = len(state_dict[RPN_SCORES + ".bias"]) if two_stage else len(state_dict[ANCHOR_DELTAS + ".bias"]) // 4
    if found != len(sizes[0]) * len(ratios):
        raise CheckpointError(
            f"{origin}: weights for {found} anchors a cell, where its configuration has {len(sizes[0]) * len(ratios)}"
        )


def fold_deltas(state_dict: StateDict, layer: str, means: list[float], stds: list[float]) -> None:
    """Let the layer that gives box deltas give those that torchvision's coder expects, in place.

    Args:
        means, stds: the other library's coder takes the layer's deltas times `stds` plus `means`, for x, y, w and h.
    """
    usual = torch.tensor(USUAL_STDS[layer], dtype=torch.float64)
    scale = torch.tensor(stds, dtype=torch.float64) / usual
    shift = torch.tensor(means, dtype=torch.float64) / usual
    if bool((scale == 1).all()) and not bool(shift.any()):
        return
    for kind, offset in (("weight", torch.zeros(4)), ("bias", shift)):
        rows = state_dict[f"{layer}.{kind}"]
        by_box = rows.double().unflatten(0, (-1, 4)).movedim(1, -1)
        state_dict[f"{layer}.{kind}"] = (by_box * scale + offset).movedim(-1, 1).flatten(0, 1).to(rows.dtype)


def background_to_front(rows: Tensor) -> Tensor:
    """Class rows `[1, …, K, background]` as `[background, 1, …, K]`; [K + 1, …]."""
    return rows.roll(1, dims=0)


def deltas_with_background(rows: Tensor, classes: int) -> Tensor:
    """Box delta rows [4K, …], or [4, …] for all classes alike, as [4 (K + 1), …] with zeros for the background."""
    per_class = rows.repeat(classes, *[1] * (rows.ndim - 1)) if len(rows) == 4 and classes > 1 else rows
    return torch.cat([torch.zeros_like(rows[:4]), per_class])


def with_unused_column(rows: Tensor, anchors: int, fill: float) -> Tensor:
    """Class rows of `anchors` anchors, [A K, …], as [A (K + 1), …] with the first row of each anchor set to `fill`."""
    by_anchor = rows.unflatten(0, (anchors, -1))
    return torch.cat([torch.full_like(by_anchor[:, :1], fill), by_anchor], dim=1).flatten(0, 1)


def fold_bgr(state_dict: StateDict) -> None:
    """Let the first convolution of a detector trained on BGR take RGB, in place."""
    state_dict["backbone.body.conv1.weight"] = state_dict["backbone.body.conv1.weight"].flip(1)


def unit_range(values: list[float]) -> list[float]:
    """Mean or standard deviation of pixels in 0-255, for pixels in [0, 1]."""
    return [round(float(value) / 255, 12) for value in values]
