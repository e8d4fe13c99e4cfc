"""One `defeat eval`: a checkpoint of any format, scored on COCO-format data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from defeat_cli import session
from defeat_cli.config.schema import validate
from defeat_cli.console import Reporter, counting, errors_table, metrics_table
from defeat_cli.data.opening import SPOKEN
from defeat_cli.detectors.loading import load_detector
from defeat_cli.engine.detection_errors import error_report
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.engine.voc_ap import voc_ap50
from defeat_cli.errors import DataError, RunError
from defeat_cli.files import write_json
from defeat_cli.jobs.asked import DETECTOR, READING, Asked, ask, data_settings
from defeat_cli.jobs.estimate import of_detecting
from defeat_cli.memory import told
from defeat_cli.precision import AUTOCAST, choose_precision
from defeat_cli.verifying import note_on_left_out, verify


@dataclass(frozen=True)
class Score:
    """metrics: the COCO figures, `per_class`, and `errors` where asked for; detections: COCO results format."""

    title: str
    metrics: dict[str, Any]
    detections: list[dict[str, Any]] = field(repr=False)

    def write(self, figures: Path | None, detections: Path | None) -> None:
        """Write the figures and the raw detections as JSON, each where a path is given."""
        for path, content in ((figures, self.metrics), (detections, self.detections)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, content)

    def tables(self, per_class: bool) -> list[Table]:
        """What a user sees."""
        tables = [metrics_table(self.metrics, self.title)]
        if per_class:
            tables.append(metrics_table(self.metrics, "AP of each class", per_class=True))
        if "errors" in self.metrics:
            tables.append(errors_table(self.metrics["errors"]))
        return tables


def score(
    checkpoint: str,
    recipe_name: str | None = None,
    changes: dict[str, Any] | None = None,
    *,
    split: str = "val",
    error_types: bool = False,
    quiet: bool = False,
) -> Score:
    """Score a checkpoint.

    Args:
        recipe_name: recipe with settings in place of the checkpoint's own, and with the data.
        changes: dotted recipe overrides.

    Raises:
        DefeatError: the checkpoint, settings, data or device cannot be used.
    """
    settings = (*DETECTOR, *data_settings(split, changes or {}), *READING, "run.device", "run.precision")
    asked = ask(checkpoint, recipe_name, changes or {}, command="eval", settings=settings)
    recipe, reporter = asked.recipe, Reporter("eval", quiet)
    device = session.choose_device(recipe.run.device, recipe.run.precision)
    precision = _precision(asked, device, reporter)
    data = session.open_data(recipe.data, split, train=False)
    loaded = load_detector(asked.weights, asked.given, classes=data.classes)
    spoken, workers = SPOKEN[split], session.loader_processes(recipe.data.workers)
    data = verify(data, recipe.data, spoken, workers, partial(counting, quiet=quiet))
    resize = loaded.detector.model.transform
    data.refuse_vanishing(resize.min_size, resize.max_size)
    for note in [*asked.notes, *data.notes]:
        reporter.note(note)
    if left_out := note_on_left_out(data.left_out, len(data), spoken):
        reporter.warn(left_out)
    loaded.tell(reporter)
    detections: list[dict[str, Any]] = []
    with told(lambda: of_detecting(loaded.detector, device)), counting("evaluating", len(data), quiet) as advance:
        metrics = evaluate(
            loaded.detector.to(device),
            data,
            workers=workers,
            autocast=AUTOCAST[precision],
            on_image=advance,
            keep_detections=detections,
        )
    if metrics["AP"] < 0:
        raise DataError(f"{recipe.data.path}: the {split} images have no boxes: there is nothing to score on")
    if data.layout == "voc":
        metrics["VOC_AP50"] = voc_ap50(detections, data.coco.dataset)["AP50"]
    if error_types:
        metrics["errors"] = error_report(detections, data.coco).to_dict()
    return Score(
        f"{checkpoint} on {len(data)} {split} images of {recipe.data.path}", metrics, data.in_own_ids(detections)
    )


def _precision(asked: Asked, device: torch.device, reporter: Reporter) -> str:
    """As it was said, else as the run evaluated that the checkpoint comes from, where the device can."""
    if "run.precision" in asked.given:
        return choose_precision(asked.recipe.run.precision, device)
    run = (asked.weights.recipe or {}).get("run")
    remembered = {"precision": run.get("precision", "fp32") if isinstance(run, dict) else "fp32"}
    trained = validate({"run": remembered}, f"{asked.weights.origin}: the recipe in it").run.precision
    try:
        return choose_precision(trained, device)
    except RunError:
        reporter.warn(f"its own run evaluated in {trained}, which this {device.type} does not have; here it is fp32")
        return "fp32"
