"""One `defeat eval`: a checkpoint of any format, scored on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from defeat_cli import session
from defeat_cli.config.schema import Recipe, validate
from defeat_cli.console import Reporter, counting, errors_table, metrics_table
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.opening import SPOKEN
from defeat_cli.detectors.loading import load_detector
from defeat_cli.engine.detection_errors import error_report
from defeat_cli.engine.evaluation import Finder, evaluate
from defeat_cli.engine.voc_ap import voc_ap50
from defeat_cli.errors import DataError, RunError
from defeat_cli.export.runtime import SUFFIX
from defeat_cli.files import write_json
from defeat_cli.jobs.asked import DETECTOR, READING, Asked, ask, data_settings
from defeat_cli.jobs.estimate import of_detecting
from defeat_cli.jobs.opening import open_exported
from defeat_cli.memory import told
from defeat_cli.precision import AUTOCAST, choose_precision
from defeat_cli.text import counted
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
        checkpoint: of any format, or an ONNX file of `defeat export`.
        recipe_name: recipe with settings in place of the checkpoint's own, and with the data.
        changes: dotted recipe overrides.

    Raises:
        DefeatError: the checkpoint, settings, data or device cannot be used.
    """
    subject = (_exported if checkpoint.endswith(SUFFIX) else _from_checkpoint)(
        checkpoint, recipe_name, changes or {}, split, Reporter("eval", quiet)
    )
    recipe, data = subject.recipe, subject.data
    detections: list[dict[str, Any]] = []
    memory = partial(of_detecting, subject.detector, subject.device)
    with told(memory), counting("evaluating", len(data), quiet) as advance:
        metrics = evaluate(
            subject.detector,
            data,
            workers=session.loader_processes(recipe.data.workers),
            autocast=AUTOCAST[subject.precision],
            on_image=advance,
            keep_detections=detections,
        )
    if data.layout == "voc":
        metrics["VOC_AP50"] = voc_ap50(detections, data.coco.dataset)["AP50"]
    if error_types:
        metrics["errors"] = error_report(detections, data.coco).to_dict()
    title = f"{checkpoint} on {counted(len(data), f'{split} image')} of {recipe.data.path}"
    if subject.precision != "fp32":  # exported files and plain torchvision compute in fp32, and find a little else
        title += f", in {subject.precision}"
    return Score(title, metrics, data.in_own_ids(detections))


@dataclass(frozen=True)
class _Subject:
    """A detector on its device, and the data that it is scored on."""

    detector: Finder
    recipe: Recipe
    device: torch.device
    precision: str
    data: DetectionDataset


def _from_checkpoint(
    checkpoint: str, recipe_name: str | None, changes: dict[str, Any], split: str, reporter: Reporter
) -> _Subject:
    settings = (*DETECTOR, *data_settings(split, changes), *READING, "run.device", "run.precision")
    asked = ask(checkpoint, recipe_name, changes, command="eval", settings=settings)
    recipe = asked.recipe
    device = session.choose_device(recipe.run.device, recipe.run.precision)
    precision = _precision(asked, device, reporter)
    data = session.open_data(recipe.data, split, train=False)
    loaded = load_detector(asked.weights, asked.given, classes=data.classes)
    for note in asked.notes:
        reporter.note(note)
    resize = loaded.detector.model.transform
    data = _read(data, recipe, split, (resize.min_size, resize.max_size), reporter)
    loaded.tell(reporter)
    return _Subject(loaded.detector.to(device), recipe, device, precision, data)


def _exported(
    checkpoint: str, recipe_name: str | None, changes: dict[str, Any], split: str, reporter: Reporter
) -> _Subject:
    settings = (*data_settings(split, changes), *READING, "run.device")
    opened = open_exported(checkpoint, recipe_name, changes, "eval", settings)
    if opened.recipe.data.path is None:
        raise DataError(f"{checkpoint}: an exported file does not know where its data is; give a folder with --data")
    data = session.open_data(opened.recipe.data, split, train=False)
    card = opened.detector.card
    data = _read(data, opened.recipe, split, ([card.short_side], card.long_side), reporter)
    return _Subject(opened.detector, opened.recipe, opened.device, "fp32", data)


def _read(
    data: DetectionDataset, recipe: Recipe, split: str, sides: tuple[Sequence[int], int], reporter: Reporter
) -> DetectionDataset:
    """The data with every image read before the first is scored; sides: the short ones and the long one."""
    spoken, workers = SPOKEN[split], session.loader_processes(recipe.data.workers)
    data = verify(data, recipe.data, spoken, workers, partial(counting, quiet=reporter.quiet))
    data.refuse_vanishing(*sides)
    for note in data.notes:
        reporter.note(note)
    if left_out := note_on_left_out(data.left_out, len(data), spoken):
        reporter.warn(left_out)
    return data


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
