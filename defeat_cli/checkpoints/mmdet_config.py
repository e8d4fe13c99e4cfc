"""Reads the configuration text that mmdetection keeps in its checkpoints, without running it.

The text is Python, `name = dict(key=value, …)` lines; only literals and `dict(…)` are understood.
"""

from __future__ import annotations

import ast
from typing import Any


def parse(text: str) -> dict[str, Any]:
    """The top-level values of a configuration; {} where the text is no such thing. What is no literal is left out."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    values = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = _value(statement.value)
    return values


def get(config: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path of nested dicts, or `default`."""
    for key in path.split("."):
        if not isinstance(config, dict) or config.get(key) is None:
            return default
        config = config[key]
    return config


def find(config: Any, key: str) -> Any:
    """The first value of `key` anywhere in nested dicts and lists, depth first; None where there is none."""
    if isinstance(config, dict):
        if config.get(key) is not None:
            return config[key]
        config = list(config.values())
    if isinstance(config, list | tuple):
        return next((found for inner in config if (found := find(inner, key)) is not None), None)
    return None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        inner = _value(node.args[0]) if node.args else {}
        named = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg}
        return {**(inner if isinstance(inner, dict) else {}), **named}
    if isinstance(node, ast.Dict):
        pairs = [(_value(key), value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        return {key: _value(value) for key, value in pairs if isinstance(key, str | int)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
