"""One `defeat eval`: a checkpoint of any format, scored on COCO-format data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from defeat_cli import session
from defeat_cli.checkpoints import native
from defeat_cli.checkpoints.loading import TORCHVISION_PREFIX, file_of
from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe
from defeat_cli.console import counting, errors_table, metrics_table
from defeat_cli.data.loading import evaluation_loader
from defeat_cli.engine.detection_errors import error_report
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.engine.runs import RECIPE, write_json
from defeat_cli.engine.voc_ap import voc_ap50
from defeat_cli.errors import DataError


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
        recipe_name: recipe that says where the data is and what a plain state dict is made of; None takes the recipe in
            the checkpoint, or the one beside it in its run folder.
        changes: dotted recipe overrides.

    Raises:
        DefeatError: the checkpoint, data or device cannot be used.
    """
    recipe, found = recipe_of(checkpoint, recipe_name, changes or {})
    architecture = recipe.student if found else None
    if split not in ("train", "val"):
        raise DataError(f"no split {split!r}; use train or val")
    device = session.choose_device(recipe.run.device, recipe.run.precision)
    data = session.open_data(recipe.data, split, train=False)
    loaded = session.load_detector(checkpoint, architecture=architecture, classes=data.classes, data=recipe.data)
    detector = loaded.detector.to(device)
    detections: list[dict[str, Any]] = []
    with counting("evaluating", len(data), quiet) as advance:
        metrics = evaluate(
            detector,
            evaluation_loader(data, recipe.data.batch_size, session.loader_processes(recipe.data.workers)),
            data.coco,
            autocast=session.AUTOCAST[recipe.run.precision],
            on_batch=advance,
            keep_detections=detections,
        )
    if data.layout == "voc":
        metrics["VOC_AP50"] = voc_ap50(detections, data.coco.dataset)["AP50"]
    if error_types:
        metrics["errors"] = error_report(detections, data.coco).to_dict()
    return Score(f"{checkpoint} on {len(data)} {split} images", metrics, data.in_own_ids(detections))


def recipe_of(checkpoint: str, name: str | None, changes: dict[str, Any]) -> tuple[Recipe, bool]:
    """The recipe that goes with a checkpoint, with changes: the named one, else its own, else that of its run folder.

    Returns:
        The recipe, and whether it was found; where it was not, its student says nothing about the checkpoint.
    """
    if name is not None:
        return recipes.load(name, changes), True
    own = None if checkpoint.startswith(TORCHVISION_PREFIX) else native.recipe_in(file_of(checkpoint))
    if own is not None:
        return recipes.validate(recipes.merged(own, changes), f"{checkpoint}: the recipe in it"), True
    beside = file_of(checkpoint).parent / RECIPE
    return recipes.load(str(beside) if beside.is_file() else None, changes), beside.is_file()
