"""Our own checkpoints: a detector that knows its architecture and classes, with what training needs to go on.

{"format": "defeat", "version": 1, "recipe": {…}, "classes": [names], "student": plain torchvision state dict,
 "training": {…}, "metrics": {…}}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from defeat_cli.checkpoints.reading import read
from defeat_cli.checkpoints.weights import Weights, is_state_dict
from defeat_cli.config.architecture import Architecture
from defeat_cli.config.schema import validate
from defeat_cli.errors import CheckpointError, RecipeError
from defeat_cli.files import replacing

FORMAT = "defeat"
VERSION = 1
KEYS = ("recipe", "classes", "student", "metrics")
"""Of every checkpoint. `terms`, and in last.pt `training`, may come with them."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint of our own; a reader never sees half a file.

    Args:
        content: the keys of `KEYS`, made of tensors, numbers, strings, lists and dicts only.
    """
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise KeyError(f"checkpoint content lacks {', '.join(missing)}")
    write_atomically(path, {"format": FORMAT, "version": VERSION, **content})


def write_atomically(path: Path, content: Any) -> None:
    """`torch.save` to a temporary name beside `path`, then rename; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(content, temporary)


def matches(content: Any) -> bool:
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def checked(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The content of a native checkpoint, once it is known to be whole and of a version that we read.

    Raises:
        CheckpointError: names what is missing or newer.
    """
    version = content.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{origin}: a defeat checkpoint of version {version}; this defeat reads version {VERSION}"
        )
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise CheckpointError(f"{origin}: a defeat checkpoint without {', '.join(missing)}")
    classes = content["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{origin}: classes should be a list of names")
    if not is_state_dict(content["student"]):
        raise CheckpointError(f"{origin}: student should be a state dict")
    return dict(content)


def to_weights(content: Mapping[str, Any], origin: str, architecture: Architecture | None = None) -> Weights:
    """The detector in a native checkpoint. It knows its own architecture: the one given by the caller is not needed."""
    content = checked(content, origin)
    # The rest of the recipe is none of a teacher's business, and may be of an earlier form.
    own = {name: content["recipe"].get(name, {}) for name in ("student", "data")}
    try:
        recipe = validate(own, f"{origin}: the recipe in it")
    except RecipeError as error:
        raise CheckpointError(str(error)) from None
    shared = {name: getattr(recipe.student, name) for name in Architecture.__dataclass_fields__}
    classes = content["classes"]
    return Weights(
        format="native",
        state_dict=dict(content["student"]),
        architecture=Architecture(**shared),
        num_classes=len(classes),
        classes=classes,
        short_side=recipe.data.short_side[-1],
        long_side=recipe.data.long_side,
        notes=[f"a defeat checkpoint: {recipe.student.detector}, {len(classes)} classes"],
    )


def load(path: Path) -> dict[str, Any]:
    """The content of a native checkpoint, checked.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """
    content = read(path)
    if not matches(content):
        raise CheckpointError(f"{path}: not a checkpoint of this tool")
    return checked(content, str(path))


def recipe_in(path: Path) -> dict[str, Any] | None:
    """The recipe in a native checkpoint, None for a file of another format.

    Raises:
        CheckpointError: it cannot be read.
    """
    content = read(path)
    return checked(content, str(path))["recipe"] if matches(content) else None
