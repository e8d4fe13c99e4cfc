"""Reads the configuration that mmdetection keeps in its checkpoints, without running it.

It is Python text, `name = dict(key=value, …)` lines. Only literals, `dict(…)` and names given before are understood.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from defeat_cli.errors import CheckpointError

WORDS = {"true": True, "false": False, "null": None}
"""Names that JSON has for what Python calls otherwise."""


@dataclass(frozen=True)
class Unread:
    """A value that is not plain: what the text has in its place."""

    text: str

    def __repr__(self) -> str:
        return self.text


def found(content: Mapping[str, Any], origin: str) -> dict[str, Any] | None:
    """The configuration in a checkpoint; None where it has none.

    Raises:
        CheckpointError: there is one, but it cannot be read.
    """
    meta = content.get("meta")
    if meta is not None and not isinstance(meta, Mapping):
        raise CheckpointError(f"{origin}: meta is {meta!r}, expected a mapping that holds the configuration")
    places = [(holder, key) for holder in (meta or {}, content) for key in ("cfg", "config")]
    for holder, key in places:
        if holder.get(key) not in (None, ""):
            name = f"{origin}: {'meta.' if holder is meta else ''}{key}"
            config = _of(holder[key], name)
            if not isinstance(config.get("model"), Mapping):
                raise CheckpointError(f"{name}: a configuration without `model`, which says what the detector is")
            return config
    return None


def _of(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        return parse(value, name)
    if isinstance(value, Mapping):
        return dict(value)
    raise CheckpointError(
        f"{name}: a configuration that cannot be read: expected its text, found {value!r}. "
        "Save the checkpoint with the text that mmdetection gives for it (`cfg.pretty_text`)"
    )


def parse(text: str, name: str) -> dict[str, Any]:
    """The top-level values of a configuration's text; one that is not plain is there as `Unread`.

    Raises:
        CheckpointError: names the line that is no `name = value`.
    """
    try:
        tree = ast.parse(text)
        if len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Dict):
            value = _value(tree.body[0].value, WORDS)  # JSON, or a dict as Python prints it
            return value if isinstance(value, dict) else {}
        values: dict[str, Any] = {}
        for statement in tree.body:
            _run(statement, values, text, name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f" (line {line}: {error.msg})" if line else ""
        raise CheckpointError(
            f"{name}: a configuration that cannot be read{where}: expected the Python text of mmdetection's, whole"
        ) from None
    return values


def _run(statement: ast.stmt, values: dict[str, Any], text: str, name: str) -> None:
    """Note what a statement assigns. Imports and comments assign nothing that matters."""
    if isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets):
        value = _value(statement.value, values)
        values.update((target.id, value) for target in statement.targets)
        return
    comment = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if not comment and not isinstance(statement, ast.Import | ast.ImportFrom):
        line = text.splitlines()[statement.lineno - 1].strip()
        raise CheckpointError(f"{name}: line {statement.lineno} is no `name = value`, and is not read: {line[:80]}")


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return _merged(node, [(keyword.arg, keyword.value) for keyword in node.keywords], known)
    if isinstance(node, ast.Dict):
        return _merged(
            node,
            [(key and _value(key, known), value) for key, value in zip(node.keys, node.values, strict=True)],
            known,
        )
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, known) for item in node.elts]
    if isinstance(node, ast.Name):
        return known.get(node.id, Unread(node.id))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Unread(ast.unparse(node))


def _merged(node: ast.expr, pairs: list[tuple[Any, ast.expr]], known: Mapping[str, Any]) -> Any:
    """The dict that a display or a `dict(…)` makes; a key of None stands for `**`."""
    given = [_value(argument, known) for argument in node.args] if isinstance(node, ast.Call) else []
    result: dict[Any, Any] = {}
    for key, value in [*((None, mapping) for mapping in given), *((key, _value(value, known)) for key, value in pairs)]:
        if (key is None and not isinstance(value, dict)) or isinstance(key, list | dict | set):
            return Unread(ast.unparse(node))
        result.update(value if key is None else {key: value})
    return result
