"""A student that starts from a trained detector (`student.weights`): classes go by name, and both compute alike."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.weights import StateDict, load_strict
from defeat_cli.config.architecture import INFERENCE, Architecture, without_effect
from defeat_cli.detectors import faster_rcnn, retinanet
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.errors import CheckpointError
from defeat_cli.text import counted, listed

ANCHOR_SIZES = {"faster_rcnn": faster_rcnn.ANCHOR_SIZES, "retinanet": retinanet.ANCHOR_SIZES}

OF_CLASSES = {
    "roi_heads.box_predictor.cls_score.": 1,
    "roi_heads.box_predictor.bbox_pred.": 4,
    "head.classification_head.cls_logits.": 1,
}
"""Layers that have outputs of their own for each class, and how many; one-stage heads repeat them for each anchor."""


def start_from(student: Detector, source: str, architecture: Architecture) -> list[str]:
    """Load a trained detector's weights into a student, of which `architecture` is what it was built from.

    Returns:
        One line on each thing that a user should know of.

    Raises:
        CheckpointError: the weights cannot be read, do not fit, or were trained by a detector that computes otherwise.
    """
    weights = load_weights(source, architecture)
    lines = list(weights.assumptions)
    compared = {name for name in INFERENCE if name.startswith(("conventions.", "anchor_"))}
    mine, theirs = (
        {name: _told(a, name) for name in sorted(compared - without_effect(architecture))}
        for a in (architecture, weights.architecture)
    )
    others = {name: value for name, value in theirs.items() if value != mine[name]}
    foreign = [f"student.{name}: {value!r}" for name, value in others.items() if name.startswith("conventions.")]
    if foreign:
        raise CheckpointError(
            "\n  ".join([f"{source}: the student has to compute as these weights were trained; set", *foreign, *lines])
        )
    lines += [
        f"{source}: trained with {name} {value!r}, where the student has {mine[name]!r}"
        for name, value in others.items()
    ]
    load_strict(student.model, weights.state_dict, source)
    if weights.classes is None:
        lines.append(
            f"{source} does not name its {counted(weights.num_classes, 'class')}: taken to be the data's, in the "
            f"data's order ({listed(student.classes)})"
        )
    elif weights.classes != student.classes:
        order, strangers = _order(student.classes, weights.classes)
        student.model.load_state_dict(_reordered(student.model.state_dict(), order))
        if strangers:
            pairs = listed([f"{student.classes[i]} from {weights.classes[order[i]]}" for i in strangers])
            lines.append(f"{source}: has other classes than the data; these start from another's weights: {pairs}")
    return lines


def _told(architecture: Architecture, name: str) -> Any:
    """A setting, with the anchor sizes of its family where it leaves them open."""
    value = attrgetter(name)(architecture)
    return ANCHOR_SIZES.get(architecture.detector) if value is None and name == "anchor_sizes" else value


def _order(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[int]]:
    """For each of our classes one of theirs, of the same name where there is one; and those of ours without."""
    partners = dict(match_classes(ours, theirs))
    left = iter(sorted(set(range(len(theirs))) - set(partners.values())))
    strangers = [i for i in range(len(ours)) if i not in partners]
    return [partners[i] if i in partners else next(left) for i in range(len(ours))], strangers


def _reordered(state_dict: StateDict, order: Sequence[int]) -> StateDict:
    """The same detector for classes in another order; the background stays first."""
    rows = [0, *(i + 1 for i in order)]
    result = dict(state_dict)
    for key, value in state_dict.items():
        outputs = next((outputs for layer, outputs in OF_CLASSES.items() if key.startswith(layer)), None)
        if outputs is not None:
            result[key] = value.unflatten(0, (-1, len(rows), outputs))[:, rows].flatten(0, 2)
    return result
