"""What a user said, as opposed to what is a default: settings by dotted name, each with where it was said."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from defeat_cli.config.schema import find_recipe, merged, read_yaml
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
        if isinstance(value, Mapping):
            given |= given_settings(value, where, f"{prefix}{name}.")
        else:
            given[f"{prefix}{name}"] = Given(value, where)
    return given


def said(recipe: str | None, changes: Mapping[str, Any]) -> dict[str, Given]:
    """The settings of a recipe file, with those of the command line over them.

    Raises:
        RecipeError: no such recipe, or it holds nothing.
    """
    in_file = given_settings(read_yaml(find_recipe(recipe)), recipe) if recipe is not None else {}
    return in_file | given_settings(merged({}, dict(changes)), COMMAND_LINE)


def refuse_without_effect(given: Mapping[str, Given], command: str, settings: Collection[str]) -> None:
    """Refuse settings of the command line that a command would ignore; a recipe may say what other commands need.

    Args:
        settings: those that have an effect, by dotted name or a section's.

    Raises:
        RecipeError: names them.
    """
    idle = [
        name
        for name, (_, where) in given.items()
        if where == COMMAND_LINE and not any(name == known or name.startswith(f"{known}.") for known in settings)
    ]
    if idle:
        raise RecipeError(f"--set {', '.join(idle)}: without effect in `defeat {command}`")
