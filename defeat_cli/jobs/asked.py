"""What a command that looks at a checkpoint was asked: its weights, what the user said, and the data that is meant.

The command line comes first, then the recipe named there, then what the checkpoint remembers of its training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defeat_cli.checkpoints.loading import file_of, load_weights
from defeat_cli.checkpoints.weights import Weights
from defeat_cli.config.architecture import INFERENCE, SIZES, STRUCTURE
from defeat_cli.config.given import COMMAND_LINE, Given, understood
from defeat_cli.config.idle import idle_in_data, refuse_idle
from defeat_cli.config.schema import Data, Recipe, validate
from defeat_cli.detectors.loading import hint

SPLITS = ("train", "val", "test")
SOURCE = (
    *("path", "format", "val_fraction", "split_seed", "classes", "shapes"),
    *(f"{split}_{what}" for split in SPLITS for what in ("annotations", "images")),
)
"""Settings of `data` that say where images and boxes are, and so belong together."""

READING = ("data.workers", "data.verify", "data.on_bad_image")
"""Settings of how images are read."""
KEPT = (*SOURCE, "workers", "on_bad_image")
"""Settings of `data` that a checkpoint's own recipe has for whoever says nothing else."""

DETECTOR = (*(f"student.{name}" for name in (*STRUCTURE, *INFERENCE)), *(f"data.{side}" for side in SIZES))


def data_settings(split: str, changes: Mapping[str, Any]) -> list[str]:
    """Settings that say where the data of a split is, by dotted name; `changes` are the command line's."""
    # Where the training images are divided, theirs are the validation's too.
    own = {split, "train"} if "data.val_fraction" in changes else {split}
    others = tuple(f"{other}_" for other in SPLITS if other not in own)
    return [f"data.{name}" for name in SOURCE if name == "val_fraction" or not name.startswith(others)]


@dataclass(frozen=True)
class Asked:
    """given: what the user said, for `load_detector`. recipe: data, device and the like, in force."""

    weights: Weights
    given: dict[str, Given]
    recipe: Recipe
    notes: list[str]


def ask(
    checkpoint: str,
    recipe_name: str | None,
    changes: Mapping[str, Any],
    *,
    command: str,
    settings: Collection[str],
) -> Asked:
    """Read a checkpoint and what is said of it.

    Args:
        recipe_name: the recipe named on the command line.
        changes: dotted recipe overrides of the command line.
        settings: those that have an effect, by dotted name or a section's.

    Raises:
        DefeatError: settings without effect or of the wrong kind, a recipe or checkpoint that cannot be read.
    """
    named, given = understood(recipe_name, changes, command, settings)
    weights = load_weights(checkpoint, hint(given))
    data, notes = _data(given, named, weights, checkpoint)
    refuse_idle((name for name, (_, where) in given.items() if where == COMMAND_LINE), idle_in_data(data))
    return Asked(weights, given, named.model_copy(update={"data": data}), notes)


def _data(given: Mapping[str, Given], named: Recipe, weights: Weights, checkpoint: str) -> tuple[Data, list[str]]:
    """The data section in force. A folder on the command line is read as it is, and never drawn."""
    remembered = (weights.recipe or {}).get("data") or {}  # checked as a mapping when it was read
    own = {name: remembered[name] for name in KEPT if remembered.get(name) is not None}
    sections = {name.split(".")[1] for name in given if name.startswith("data.")}
    spoken = {name: getattr(named.data, name) for name in KEPT if name in sections}
    notes = []
    if isinstance(own.get("path"), str):
        own["path"] = _found(own["path"], weights, checkpoint)
    if "path" in spoken and not _same(spoken["path"], own.get("path")):
        names = [name for name in own if name.endswith(("annotations", "images")) and name not in spoken]
        notes += [f"data.{name} {own[name]!r} belongs to the checkpoint's own data and is not used" for name in names]
        own = {"workers": own["workers"]} if "workers" in own else {}
    source = {**own, **spoken}
    on_command_line = {name for name, (_, where) in given.items() if where == COMMAND_LINE}
    if "data.path" in on_command_line and "data.format" not in on_command_line and source.get("format") == "shapes":
        source["format"] = "auto"
    if "path" not in spoken and source.get("path") != remembered.get("path"):
        notes.append(f"data: {source['path']}, which the checkpoint remembers as {remembered['path']}")
    section = {**named.data.model_dump(), **source}
    return validate({"data": section}, f"{checkpoint}: the data that it remembers").data, notes


def _found(path: str, weights: Weights, checkpoint: str) -> str:
    """Where a relative path in a checkpoint's recipe leads to, from whatever folder the command is given in."""
    beside = file_of(checkpoint).resolve().parent
    starts = [weights.folder, Path()] if weights.folder is not None else [Path(), beside, *beside.parents]
    for start in starts:
        if (start / path).is_dir():
            return path if _same(str(start / path), path) else str((start / path).resolve())
    return path


def _same(path: str, other: str | None) -> bool:
    return other is not None and Path(path).resolve() == Path(other).resolve()
