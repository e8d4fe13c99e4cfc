"""Which variants a study compares, as a user names them: variants, groups, and sweeps like `neck:alpha_bg=1,4,16`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe, nearest
from defeat_cli.config.variants import Variant, find_variant
from defeat_cli.config.yaml import parse_assignments
from defeat_cli.errors import RecipeError
from defeat_cli.text import listed

BASELINE = "none"
"""The variant that others are compared with unless another is named, and which is part of every study."""

TERMS = "distillation."
"""Under this key are the settings of the terms, a section each."""


@dataclass(frozen=True)
class SweepPoint(Variant):
    """A variant with some settings at chosen values: one point of a sweep.

    base: the variant's name; settings: full recipe key -> value.
    """

    base: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sweep(self) -> tuple[str, ...]:
        """What all points of one sweep have in common."""
        return (self.base, *self.settings)

    @property
    def said(self) -> str:
        """Its settings as a user reads them."""
        return ", ".join(f"{key}={shown(value)}" for key, value in self.settings.items())


def choose(
    names: Sequence[str], known: Mapping[str, Variant], groups: Mapping[str, Sequence[str]], recipe: Recipe
) -> tuple[dict[str, Variant], set[str]]:
    """The variants that the names mean, `none` first, and which of them only a group stands for.

    Args:
        names: a variant, `one/other` for both, a sweep `variant:setting=value,value` (several settings make a grid), or
            a group.
        known: the variants that there are.
        groups: group name -> its variants.
        recipe: what the variants change; tells which settings each of them has.

    Raises:
        RecipeError: an unknown variant or setting (names the nearest), a sweep without values, or a name given twice.
    """
    typed = [pair for text in names if text not in groups for pair in _meant(text, known, recipe)]
    twice = [name for name, count in Counter(name for name, _ in typed).items() if count > 1]
    if twice:
        raise RecipeError(f"variant {listed(twice)} is named twice; name each once")
    named = {BASELINE: find_variant(BASELINE, known), **dict(typed)}
    grouped = {name: find_variant(name, known) for text in names for name in groups.get(text, ())}
    return {**named, **grouped}, grouped.keys() - named.keys()


def shown(value: Any) -> str:
    """A setting's value as in a variant's name."""
    return value if isinstance(value, str) else json.dumps(value)


def short(key: str) -> str:
    """A setting's key without the sections that it is in."""
    return key.rpartition(".")[2]


def _meant(text: str, known: Mapping[str, Variant], recipe: Recipe) -> Iterator[tuple[str, Variant]]:
    """The variants that one word of the command line stands for, by name."""
    # A value may hold a colon, so only one with `key=` behind it begins a setting.
    bases, *settings = [text] if text in known else re.split(r":(?=[\w.]+=)", text)
    for base in [bases] if bases in known else bases.split("/"):
        variant = find_variant(base, known)
        if not settings:
            yield base, variant
            continue
        sections = _settings(base, variant, recipe)
        values = [_values(text, base, assignment, sections) for assignment in settings]
        keys = [key for key, _ in values]
        if len(set(keys)) < len(keys):
            raise RecipeError(f"{text}: gives {listed(keys)}; name each setting once, with all its values")
        for point in product(*(choices for _, choices in values)):
            chosen = dict(zip(keys, point, strict=True))
            named = [f"{_briefly(key, sections)}={shown(value)}" for key, value in chosen.items()]
            summary = f"{variant.summary}; {', '.join(named)}"
            yield ":".join([base, *named]), SweepPoint(summary, {**variant.overrides, **chosen}, base, chosen)


def _settings(base: str, variant: Variant, recipe: Recipe) -> list[str]:
    """Full keys of all settings of a variant's recipe; those of a term that is off are not there."""
    content = recipes.merged(recipe.model_dump(), variant.overrides, f"variant {base}:")
    return list(_leaves(recipes.validate(content, f"the recipe of variant {base}").model_dump()))


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _values(text: str, base: str, assignment: str, settings: list[str]) -> tuple[str, list[Any]]:
    """Full key and values of `alpha_bg=1,4,16`."""
    key, _, values = assignment.partition("=")
    try:
        parsed = parse_assignments([f"{key}=[{values}]"])[key]
    except RecipeError:
        raise RecipeError(f"{text}: {values!r} are no YAML values separated by commas, e.g. {key}=1,4,16") from None
    if not parsed:
        raise RecipeError(f"{text}: give the values of {key}, e.g. {key}=1,4,16")
    twice = [shown(value) for i, value in enumerate(parsed) if value in parsed[:i]]
    if twice:
        raise RecipeError(f"{text}: {key}={listed(twice)} is named twice; name each value once")
    return _full_key(key, base, settings), parsed


def _full_key(key: str, base: str, settings: list[str]) -> str:
    """A full recipe key from itself, or from the end of exactly one of the distillation's."""
    if key in settings:
        return key
    distillation = _distillation(settings)
    matching = [name for name in distillation if name.endswith(f".{key}")]
    if len(matching) > 1:
        raise RecipeError(f"{base}:{key} may be {' or '.join(matching)}; write the one that you mean in full")
    if not matching:
        near = nearest(key, settings if "." in key else map(short, distillation))
        own = [name.removeprefix(TERMS) for name in distillation if name.count(".") > 1]
        own = f"one of its terms' settings ({listed(own, most=20)}) or " if own else ""
        raise RecipeError(
            f"{base}:{key}: variant {base} has no such setting{near}. Give {own}a full recipe key, e.g. optimizer.lr"
        )
    return matching[0]


def _briefly(key: str, settings: list[str]) -> str:
    """The shortest unambiguous way to write a key, so that a sweep has one name however its key was written."""
    alone = [name for name in _distillation(settings) if short(name) == short(key)] == [key]
    return short(key) if alone else key


def _distillation(settings: list[str]) -> list[str]:
    return [name for name in settings if name.startswith(TERMS)]
