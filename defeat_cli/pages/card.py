"""`model_card.md`: what someone needs to know who is given the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from defeat_cli.console import results_sheet
from defeat_cli.pages.rendering import write_page
from defeat_cli.pages.tables import class_sheet, error_sheet, verdict


def write_card(
    path: Path, name: str, results: Mapping[str, Any], *, facts: Mapping[str, str], classes: Sequence[str]
) -> None:
    """Write the card, with places left open for what only its author knows: licences, intended use, limits.

    Args:
        name: of the run. results: as results.json holds them.
        facts: what was trained, on what and how, in a few words each.
        classes: label `i + 1` is `classes[i]`.
    """
    write_page(
        path,
        "model_card.md",
        name=name,
        verdict=verdict(results),
        results=results_sheet(dict(results)),
        per_class=class_sheet(results),
        errors=error_sheet(results),
        facts=facts,
        classes=classes,
    )
