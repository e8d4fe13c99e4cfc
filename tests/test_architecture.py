"""Imports point one way (design, section 3)."""

import ast
from pathlib import Path

import pytest

import defeat_cli

PACKAGE = Path(defeat_cli.__file__).parent

ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "text": set(),
    "memory": {"errors"},
    "tables": set(),
    "console": {"tables", "text"},
    "precision": {"errors"},
    "config": {"config", "errors", "files", "text"},
    "checkpoints": {"checkpoints", "config", "errors", "files", "text"},
    "detectors": {"detectors", "checkpoints", "config", "errors", "text"},
    "data": {"data", "errors", "files", "text"},
    "distillation": {"distillation", "detectors", "config", "errors", "text"},
    "engine": {"engine", "precision", "distillation", "detectors", "data", "config", "errors", "files", "text"},
    "benchmark": {"benchmark", "engine", "distillation", "detectors", "data", "errors", "files"},
    "gradients": {"gradients", "distillation", "detectors", "data", "config", "errors", "files", "text"},
    "audit": {"audit", "distillation", "data", "errors", "text"},
    "export": {"export", "detectors", "config", "errors", "files"},
    "ablation": {"ablation", "pages", "engine", "config", "console", "errors", "files", "tables", "text"},
    "starting": {"distillation", "detectors", "checkpoints", "config", "errors", "text"},
    "tracking": {"tracking", "engine", "errors", "files"},
    "pages": {"pages", "engine", "detectors", "data", "config", "console", "errors", "files", "tables", "text"},
    "verifying": {"audit", "detectors", "data", "config", "errors", "text"},
    "building": {"distillation", "detectors", "config", "errors"},
    "session": {
        *("building", "tracking", "precision", "starting", "verifying", "audit"),
        *("distillation", "detectors", "data", "config", "errors", "text"),
    },
}
"""What each part may import of ours. Parts not named here stand on top and may import anything."""


LAZY = {"config": {"distillation"}}
"""What a part may import inside a function beyond that: a recipe takes the settings of a term not shipped."""


def imported_parts(path: Path, lazy: bool = True) -> set[str]:
    """Parts that a file imports, those inside functions too where `lazy`."""
    parts = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("defeat_cli."):
            parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "defeat_cli":
            parts.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            parts.update(a.name.split(".")[1] for a in node.names if a.name.startswith("defeat_cli."))
    return parts


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    files = list((PACKAGE / part).rglob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    for file in files:
        assert imported_parts(file, lazy=False) <= ALLOWED[part], file.name
        assert imported_parts(file) <= ALLOWED[part] | LAZY.get(part, set()), file.name


def test_the_reader_of_imports_sees_them():
    assert imported_parts(PACKAGE / "session.py") >= {"building", "config"}
    assert "distillation" in imported_parts(PACKAGE / "config" / "schema.py")
