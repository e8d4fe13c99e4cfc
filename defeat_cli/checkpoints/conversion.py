"""What conversions from other libraries share: renaming by a key table, class order, channel order of the input.

mmdetection and detectron2 agree in most of what sets them apart from torchvision: the background is the last class or,
in one-stage detectors, has no column; it has no box deltas; many models are trained on BGR pixels in 0-255.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from defeat_cli.checkpoints.weights import StateDict
from defeat_cli.errors import CheckpointError

KeyTable = list[tuple[str, str]]
"""Rows of (pattern, replacement). A key that a pattern matches as a whole is renamed; the first such row counts."""

CLASS_SCORES = "roi_heads.box_predictor.cls_score"
BOX_DELTAS = "roi_heads.box_predictor.bbox_pred"
RPN_SCORES = "rpn.head.cls_logits"
HIDDEN = "roi_heads.box_head.fc7"
P6 = "backbone.fpn.extra_blocks.p6"
CLASS_LOGITS = "head.classification_head.cls_logits"
ANCHOR_DELTAS = "head.regression_head.bbox_reg"

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
