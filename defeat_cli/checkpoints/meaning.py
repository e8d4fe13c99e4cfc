"""What weights mean beyond their numbers: settings, classes and image sizes, which travel with a plain state dict.

torch keeps `_metadata` with a state dict through saving and loading, and looks in it by the names of modules alone: an
entry of another name is carried along, and the state dict still loads strict in plain torchvision. Files without that
entry may have a recipe beside them, which says the same but for the classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from defeat_cli.config.architecture import STRICT, Architecture, changed_settings
from defeat_cli.config.schema import Data, Student, nearest
from defeat_cli.config.types import Count
from defeat_cli.config.yaml import read_yaml
from defeat_cli.errors import CheckpointError, RecipeError

ENTRY = "defeat"
VERSION = 1
STARTED_FROM = ("backbone_weights", "weights")
"""Settings of a student in recipes of any version that say nothing of the trained weights."""


@dataclass(frozen=True, config=STRICT)
class Meaning:
    """architecture: all of the detector's settings; classes: names, None where unknown; sides: of images, pixels."""

    architecture: Architecture
    classes: list[str] | None
    short_side: Count
    long_side: Count


def with_meaning(state_dict: Mapping[str, Tensor], meaning: Meaning) -> OrderedDict[str, Tensor]:
    """The same tensors, to be saved with `torch.save`, which say what they are."""
    result = OrderedDict(state_dict)
    result._metadata = OrderedDict(getattr(state_dict, "_metadata", {}))
    result._metadata[ENTRY] = {
        "version": VERSION,
        "architecture": changed_settings(meaning.architecture),
        "classes": meaning.classes,
        "short_side": meaning.short_side,
        "long_side": meaning.long_side,
    }
    return result


def meaning_of(state_dict: Mapping[str, Tensor], origin: str) -> Meaning | None:
    """What `with_meaning` wrote; None where a state dict says nothing.

    Raises:
        CheckpointError: a newer version wrote it.
    """
    metadata = getattr(state_dict, "_metadata", {})
    if not isinstance(metadata, Mapping) or metadata.get(ENTRY) is None:
        return None
    entry = metadata[ENTRY]
    version = entry.get("version") if isinstance(entry, Mapping) else None
    if version != VERSION:
        raise CheckpointError(f"{origin}: says what it is in version {version}; this defeat reads version {VERSION}")
    return _checked({name: value for name, value in entry.items() if name != "version"}, origin)


def meaning_of_recipe(recipe: Mapping[str, Any], origin: str, classes: list[str] | None = None) -> Meaning:
    """What a recipe says of its student. Its other sections, which differ in older versions, are not looked at.

    Raises:
        CheckpointError: settings that no student has.
    """
    student, data = ({} if recipe.get(name) is None else recipe[name] for name in ("student", "data"))
    if not isinstance(student, Mapping) or not isinstance(data, Mapping):
        raise CheckpointError(f"{origin}: student and data should be groups of keys")
    unknown = next((name for name in student if name not in {*Student.__dataclass_fields__, *STARTED_FROM}), None)
    if unknown is not None:
        near = nearest(str(unknown), Architecture.__dataclass_fields__)
        raise CheckpointError(f"{origin}: student.{unknown}: unknown key{near}")
    short_side = data.get("short_side", Data().short_side)
    meaning = {
        "architecture": {name: value for name, value in student.items() if name in Architecture.__dataclass_fields__},
        "classes": classes,
        "short_side": short_side[-1] if isinstance(short_side, list) and short_side else short_side,
        "long_side": data.get("long_side", Data().long_side),
    }
    return _checked(meaning, origin)


def _checked(meaning: Mapping[str, Any], origin: str) -> Meaning:
    try:
        return TypeAdapter(Meaning).validate_python(meaning)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = ".".join(map(str, item["loc"])).replace("architecture", "student", 1)
            problems.append(f"{name}: {item['msg'].removeprefix('Value error, ')}")
        raise CheckpointError("\n  ".join([f"{origin}: cannot be used:", *problems])) from None


def recipes_beside(path: Path) -> list[Path]:
    """Recipes that may belong to the weights in a file: `x.yaml` beside `x.pth`, and its run folder's."""
    return [file for file in (path.with_suffix(".yaml"), path.parent / "recipe.yaml") if file.is_file()]


def meaning_beside(
    path: Path, fits: Callable[[Architecture], bool]
) -> tuple[Meaning | None, dict[str, Any] | None, list[str]]:
    """What a recipe beside a file says of the weights in it.

    Args:
        fits: architecture -> whether the weights can be of such a detector.

    Returns:
        Its meaning and its content, both None where there is none that fits; and a note on each recipe that was looked
        at.
    """
    notes = []
    for file in recipes_beside(path):
        try:
            content = read_yaml(file)
            meaning = meaning_of_recipe(content, str(file))
        except (RecipeError, CheckpointError) as error:
            notes.append(f"{file}, beside it, is not used: {error}")
            continue
        if fits(meaning.architecture):
            return meaning, content, [*notes, f"settings from {file}, beside it"]
        notes.append(f"{file}, beside it, is not used: it describes a detector of other weights")
    return None, None, notes
