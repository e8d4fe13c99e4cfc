"""YAML as people write it, read strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from defeat_cli.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number, as people write it, and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        RecipeError: it does not parse (with the line), or holds nothing or something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None
    return _parsed_mapping(text, str(path))


def _parsed_mapping(text: str, origin: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{origin}:{mark.line + 1}" if mark else origin
        raise RecipeError(f"{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not content:
        raise RecipeError(f"{origin}: is empty")
    if not isinstance(content, dict):
        raise RecipeError(f"{origin}: expected a mapping of keys to values, found {type(content).__name__}")
    return content


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["optimizer.lr=1e-3"]` as dotted keys to YAML values."""
    values = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {assignment}: expected dotted.key=value, e.g. optimizer.lr=0.01")
        if key.strip() in values:
            raise RecipeError(f"--set {key.strip()} is given twice")
        try:
            values[key.strip()] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise RecipeError(f"--set {assignment}: {value!r} is not a valid YAML value") from None
    return values
