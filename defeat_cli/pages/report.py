"""`report.html`: a run on one page that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from defeat_cli.console import results_sheet
from defeat_cli.engine.curves import panels
from defeat_cli.pages.charts import SERIES, chart
from defeat_cli.pages.examples import LOWEST, Boxes, Example
from defeat_cli.pages.pictures import defined, overlaid
from defeat_cli.pages.rendering import write_page
from defeat_cli.pages.tables import class_sheet, error_sheet, verdict


def write_report(
    path: Path,
    name: str,
    results: Mapping[str, Any],
    *,
    metrics: list[dict[str, Any]],
    terms: Sequence[str],
    facts: Mapping[str, str],
    recipe: str,
    examples: Sequence[Example],
    found: Mapping[str, Sequence[Boxes]],
) -> None:
    """Write the page.

    Args:
        name: of the run.
        results, metrics: as results.json and metrics.jsonl hold them.
        terms: names of the distillation terms.
        facts: what was trained, on what and how, in a few words each.
        recipe: the YAML.
        found: who -> what it finds in each of the examples.
    """
    classes = list(dict.fromkeys([*results["student"]["per_class"], *_names(found.values())]))
    rows = []
    for i, example in enumerate(examples):
        boxes = {"annotated": example.truth, **{who: per_image[i] for who, per_image in found.items()}}
        pictures = {who: overlaid(example, one, f"image{i}", classes, who) for who, one in boxes.items()}
        rows.append((example.name, pictures))
    last = max(entry["step"] for entry in metrics)
    drawn = [(panel, chart(panel, last)) for panel in panels(metrics, terms)]
    write_page(
        path,
        "run.html",
        name=name,
        verdict=verdict(results),
        results=results_sheet(dict(results)),
        classes=class_sheet(results),
        errors=error_sheet(results),
        charts=[(panel, drawing) for panel, drawing in drawn if drawing],
        colors=SERIES,
        facts=facts,
        recipe=recipe,
        images=[defined(example, f"image{i}") for i, example in enumerate(examples)],
        examples=rows,
        lowest=LOWEST,
    )


def _names(found: Any) -> list[str]:
    return [name for per_image in found for boxes in per_image for name in boxes.names]
