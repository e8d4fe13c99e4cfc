"""Imports point one way (design, section 3)."""

import ast
from pathlib import Path

import pytest

import defeat_cli

PACKAGE = Path(defeat_cli.__file__).parent

ALLOWED = {
    "errors": set(),
    "files": set(),
    "text": set(),
    "console": set(),
    "config": {"config", "errors", "files"},
    "checkpoints": {"checkpoints", "config", "errors", "files"},
    "detectors": {"detectors", "checkpoints", "config", "errors"},
    "data": {"data", "errors"},
    "distillation": {"distillation", "detectors", "errors"},
    "engine": {"engine", "distillation", "detectors", "data", "config", "errors", "files"},
    "ablation": {"ablation", "engine", "config", "console", "errors", "files", "text"},
    "session": {"engine", "distillation", "detectors", "data", "checkpoints", "config", "errors", "files"},
}
"""What each part may import of ours. Parts not named here stand on top and may import anything."""


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("defeat_cli."):
            parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "defeat_cli":
            parts.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            parts.update(a.name.split(".")[1] for a in node.names if a.name.startswith("defeat_cli."))
    return parts


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    files = list((PACKAGE / part).glob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    for file in files:
        assert imported_parts(file) <= ALLOWED[part], f"{file.name} imports {imported_parts(file) - ALLOWED[part]}"


def test_the_reader_of_imports_sees_them():
    assert imported_parts(PACKAGE / "session.py") >= {"engine", "detectors", "config"}
