"""Opening a detector to use it: a checkpoint of any format, or an exported ONNX file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from defeat_cli import session
from defeat_cli.config.given import understood
from defeat_cli.config.idle import idle_in_data, refuse_idle
from defeat_cli.config.schema import Recipe
from defeat_cli.detectors.loading import load_detector
from defeat_cli.engine.evaluation import Finder
from defeat_cli.errors import CheckpointError
from defeat_cli.export.runtime import SUFFIX, OnnxDetector
from defeat_cli.jobs.asked import DETECTOR, ask, data_settings


@dataclass(frozen=True)
class Opened:
    """A detector in eval mode on its device.

    recipe: data and device in force.
    lowest: score below which it gives nothing.
    named: whether the checkpoint itself names the classes.
    notes: what a user should know.
    """

    detector: Finder
    recipe: Recipe
    device: torch.device
    lowest: float
    named: bool = True
    notes: list[str] = field(default_factory=list)


def open_detector(
    checkpoint: str,
    recipe_name: str | None,
    changes: Mapping[str, Any],
    command: str,
    splits: Sequence[str] = ("val",),
) -> Opened:
    """The detector in a checkpoint of any format. Classes that it does not name are the data's, else numbers.

    Args:
        recipe_name: recipe that says what a plain state dict is made of; None takes the checkpoint's own.
        changes: dotted recipe overrides.
        command: what a message calls the command, e.g. `predict`.
        splits: those of the data that the command reads.

    Raises:
        DefeatError: the checkpoint, recipe, device or data cannot be used, or a setting has no effect.
    """
    of_data = [name for split in splits for name in data_settings(split, changes)]
    settings = (*DETECTOR, *of_data, "run.device")
    asked = ask(checkpoint, recipe_name, changes, command=command, settings=settings)
    recipe, notes = asked.recipe, list(asked.notes)
    device = session.choose_device(recipe.run.device)
    classes = asked.weights.classes
    if classes is None and recipe.data.path is not None:
        classes = session.open_data(recipe.data, "val", train=False).classes
    elif classes is None:
        notes.append(
            f"{checkpoint}: does not name its classes, which are numbered; --data takes the names of a data set"
        )
    loaded = load_detector(asked.weights, asked.given, classes=classes)
    notes += [*loaded.notes, *loaded.assumptions]
    detector = loaded.detector.to(device).eval()
    selection = getattr(detector.model, "roi_heads", detector.model)
    return Opened(detector, recipe, device, selection.score_thresh, asked.weights.classes is not None, notes)


def open_finder(
    checkpoint: str, recipe_name: str | None, changes: Mapping[str, Any], command: str = "predict"
) -> Opened:
    """As `open_detector`, and files that `defeat export` wrote as ONNX, which onnxruntime runs on the CPU."""
    if not checkpoint.endswith(SUFFIX):
        return open_detector(checkpoint, recipe_name, changes, command)
    return open_exported(checkpoint, recipe_name, changes, command, (*data_settings("val", changes), "run.device"))


def open_exported(
    checkpoint: str, recipe_name: str | None, changes: Mapping[str, Any], command: str, settings: Collection[str]
) -> Opened:
    """An ONNX file of `defeat export`.

    Args:
        settings: those that have an effect, by dotted name.

    Raises:
        DefeatError: the file or the device cannot be used; settings of the detector, which cannot be changed, or others
            without effect.
    """
    idle = [name for name in changes if name in DETECTOR or name.startswith("student.")]
    if recipe_name is not None or idle:
        what = ", ".join(["--recipe"] * (recipe_name is not None) + idle)
        raise CheckpointError(f"{checkpoint}: an exported file cannot be changed; leave {what} out, or export again")
    recipe, given = understood(None, changes, command, settings)
    refuse_idle(given, idle_in_data(recipe.data))
    if recipe.run.device not in ("auto", "cpu"):
        raise CheckpointError(
            f"{checkpoint}: exported files are run on the CPU; leave --device {recipe.run.device} out"
        )
    detector = OnnxDetector(Path(checkpoint))
    return Opened(detector, recipe, torch.device("cpu"), detector.card.score_threshold)
