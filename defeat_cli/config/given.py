"""What a user said, as opposed to what is a default: settings by dotted name, each with where it was said."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from defeat_cli.config.schema import Recipe, find_recipe, load, merged, validate
from defeat_cli.config.yaml import read_yaml
from defeat_cli.errors import RecipeError

COMMAND_LINE = "the command line"


class Given(NamedTuple):
    """A setting's value, and where it was said: `the command line`, or the name of a recipe."""

    value: Any
    where: str


def given_settings(settings: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Given]:
    """Nested settings by dotted name, `prefix` before each."""
    given: dict[str, Given] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            given |= given_settings(value, where, f"{prefix}{name}.")
        else:
            given[f"{prefix}{name}"] = Given(value, where)
    return given


def understood(
    name: str | None, changes: Mapping[str, Any], command: str, effective: Collection[str]
) -> tuple[Recipe, dict[str, Given]]:
    """A recipe with the changes of the command line, for a command that looks at a trained detector.

    Settings of the detector itself, `student`, are checked by `detectors.loading`, which knows those that they change.

    Args:
        name: of the recipe; None takes the defaults.
        effective: settings that the command does not ignore, by dotted name or a section's. Others are refused on the
            command line; a recipe may say what other commands need.

    Returns:
        The recipe, and what was said: the settings of its file, with those of the command line over them.

    Raises:
        RecipeError: no such recipe, one that holds nothing or cannot be used, or a change that has no effect.
    """
    changed = given_settings(merged({}, dict(changes)), COMMAND_LINE)
    for key, (value, _) in changed.items():
        if not any(key == known or key.startswith(f"{known}.") for known in effective):
            validate(merged({}, {key: value}), "--set")  # a word that no recipe knows gets its own message
            raise RecipeError(f"--set {key}: without effect in `defeat {command}`")
    in_file = given_settings(read_yaml(find_recipe(name)), name) if name is not None else {}
    others = {key: value for key, (value, _) in changed.items() if not key.startswith("student.")}
    return load(name, others), in_file | changed
