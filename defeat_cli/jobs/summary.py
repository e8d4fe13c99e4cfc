"""`results.md` of a run: the tables that a user saw, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from defeat_cli.console import percent, results_sheet
from defeat_cli.files import replacing
from defeat_cli.tables import Sheet


def write_summary(path: Path, name: str, results: dict[str, Any]) -> None:
    """Write the result table, and AP of each class.

    Args:
        name: of the run. results: as `results.json` has them.
    """
    sheet = results_sheet(results)
    classes = [[name, percent(ap)] for name, ap in results["student"]["per_class"].items()]
    parts = [f"# {name}", f"{sheet.title}:", sheet.markdown()]
    parts += ["AP of each class:", Sheet("", ["class", "AP"], classes).markdown()]
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
