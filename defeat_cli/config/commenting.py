"""A chosen recipe as a YAML file for people: each setting below the reason for it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

from defeat_cli.config.choosing import Choice, Facts
from defeat_cli.config.schema import Recipe, merged

WIDTH = 110


def commented(choice: Choice, facts: Facts, path: Path) -> str:
    """The text of a recipe file.

    Args:
        path: what the file will be called.

    Raises:
        RecipeError: what the user said cannot be used.
    """
    choice.recipe()
    goal = "Distils a student from its teacher" if facts.teacher is not None else "Trains a detector"
    lines = [*textwrap.wrap(f"{goal} on {facts.data}; chosen for {facts}.", WIDTH), "", f"  defeat train -r {path}", ""]
    lines += ["What is not here has its default; the recipe.yaml that a run leaves holds every value."]
    if facts.teacher is None:
        lines += ["To distil from a trained detector, choose anew: defeat init DATA --teacher CHECKPOINT"]
    lines = [f"# {line}".rstrip() for line in lines]
    why = {key: reason.why for reason in choice.reasons for key in reason.settings}
    content = merged(merged({}, choice.settings), {"run.name": choice.name, **choice.said})
    for section in Recipe.model_fields:
        if section in content:
            lines += ["", f"{section}:", *_section(content[section], why, f"{section}.", "  ")]
    return "\n".join(lines) + "\n"


def _section(content: dict[str, Any], why: dict[str, str], prefix: str, indent: str) -> list[str]:
    """Lines of a section; a reason that several settings share stands once above them."""
    lines, before = [], None
    for key, value in content.items():
        reason = why.get(f"{prefix}{key}")
        if reason is not None and reason != before:
            lines += [f"{indent}# {line}" for line in textwrap.wrap(reason, WIDTH)]
        before = reason
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_section(value, why, f"{prefix}{key}.", f"{indent}  ")]
        else:
            lines.append(f"{indent}{key}: {_flow(value)}")
    return lines


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
