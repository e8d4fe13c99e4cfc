"""report.html, model_card.md and detections.png of a run: at its end, and again by `defeat report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision

import defeat_cli
from defeat_cli import session as sessions
from defeat_cli.config import schema as recipes
from defeat_cli.config.architecture import backbone_name, family
from defeat_cli.config.schema import Recipe
from defeat_cli.console import Reporter
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.loading import load_detector
from defeat_cli.engine.runs import BEST, CARD, DETECTIONS, RECIPE, REPORT, RunFolder
from defeat_cli.errors import RunError
from defeat_cli.jobs.examples import find, write_detections
from defeat_cli.pages.card import write_card
from defeat_cli.pages.examples import choose_examples
from defeat_cli.pages.report import write_report
from defeat_cli.pages.tables import who_is_in
from defeat_cli.precision import choose_precision
from defeat_cli.session import Session
from defeat_cli.text import counted, listed, spoken_duration

EXAMPLES = 6
"""Images on which detectors are shown side by side."""


def write_pages(session: Session, run: RunFolder, results: Mapping[str, Any]) -> None:
    """Write the pages and their picture to the folder of a run whose checkpoints are there.

    Args:
        results: as results.json holds them.

    Raises:
        CheckpointError: a student's checkpoint cannot be read.
    """
    name, facts = run.path.resolve().name, what_was_trained(session, run.recipe, results)
    examples = choose_examples(session.validation_data, EXAMPLES)
    found = {}
    for who, called in who_is_in(results).items():
        detector = _detector(session, run, who)
        if detector is not None:
            found[called] = find(session, detector, examples)
    write_detections(run / DETECTIONS, examples, found)
    write_report(
        run / REPORT,
        name,
        results,
        metrics=run.metrics(),
        terms=list(session.distiller.terms),
        facts=facts,
        recipe=(run / RECIPE).read_text(encoding="utf-8"),
        examples=examples,
        found=found,
    )
    write_card(run / CARD, name, results, facts=facts, classes=session.training_data.classes)


def report(folder: Path, changes: Mapping[str, Any], quiet: bool = False) -> list[Path]:
    """Write the pages of a finished run again, from what is in its folder, its data and its teacher.

    Args:
        changes: dotted recipe overrides, of where the data and the teacher are now, and of the device.

    Returns:
        The files.

    Raises:
        DefeatError: no finished run is there, or its data or teacher cannot be used.
    """
    run = RunFolder(folder)
    if not run.exists or not run.finished:
        raise RunError(f"{folder}: holds no finished run; name the folder of one, e.g. runs/student")
    recipe = recipes.load(str(run / RECIPE), {**changes, "run.track": []})
    trained = folder / "teacher" / BEST
    reporter = Reporter("report", quiet)
    device = sessions.choose_device(recipe.run.device)
    try:
        choose_precision(recipe.run.precision, device)
    except RunError:
        reporter.note(
            f"the run computed in {recipe.run.precision}, which this device does not have; the images show "
            "what is found without it"
        )
        recipe.run.precision = "auto"
    session = sessions.assemble(recipe, teacher=_trained_teacher(recipe, trained), doing=reporter.doing)
    session.distiller.to(session.device)
    write_pages(session, run, run.results())
    return [run / REPORT, run / CARD, run / DETECTIONS]


def _trained_teacher(recipe: Recipe, file: Path) -> str | None:
    """The teacher that the run has trained, where it trained one."""
    return str(file) if recipe.teacher.checkpoint is None and recipe.teacher.recipe and file.is_file() else None


def _detector(session: Session, run: RunFolder, who: str) -> Detector | None:
    """One of those that were scored, on the session's device; None where it is not there."""
    if who == "teacher":
        return session.teacher
    file = run / BEST if who == "student" else run / "plain" / BEST
    return load_detector(str(file)).detector.to(session.device) if file.is_file() else None


def what_was_trained(session: Session, recipe: Recipe, results: Mapping[str, Any]) -> dict[str, str]:
    """Data, detectors, terms and schedule, in a few words each.

    Args:
        recipe: that the run was made by. The session may be on another device, with data that lies elsewhere now.
    """
    data, schedule, optimizer = recipe.data, recipe.schedule, recipe.optimizer
    classes = session.training_data.classes
    facts = {
        "data": f"{data.path}: {len(session.training_data):,} training and "
        f"{counted(len(session.validation_data), 'validation image')}, {counted(len(classes), 'class')} "
        f"({listed(classes)})",
        "student": f"{family(recipe.student)} on {backbone_name(recipe.student)}, {_size(session.student)}",
    }
    if session.unlabelled is not None:
        facts["data"] += f"; {counted(len(session.unlabelled), 'image')} without annotations ({data.unlabelled})"
    if session.teacher is not None:
        teacher = session.checkpoint or f"by the recipe {recipe.teacher.recipe}"
        facts["teacher"] = f"{teacher}, {type(session.teacher.model).__name__}, {_size(session.teacher)}"
        facts["terms"] = ", ".join(session.distiller.terms) or "none"
    sides = ", ".join(map(str, data.short_side))
    facts |= {
        "image size": f"short side {sides}, long side at most {data.long_side} pixels",
        "schedule": f"{counted(schedule.epochs, 'epoch')} of batches of {data.batch_size}, {optimizer.name}, "
        f"learning rate {optimizer.lr:g}, {recipe.run.precision}, seed {recipe.run.seed}",
        "training time": spoken_duration(results["training_seconds"]),
    }
    if "environment" in results:  # older runs do not tell
        made = results["environment"]
        facts["training time"] += f" on {made['device']}"
        facts["software"] = ", ".join(f"{name} {made[name]}" for name in ("defeat", "torch", "torchvision"))
    if "stopped_early_at_step" in results:
        facts["schedule"] += f"; stopped early at step {results['stopped_early_at_step']:,}"
    return facts


def _size(detector: Detector) -> str:
    return f"{sum(parameter.numel() for parameter in detector.model.parameters()) / 1e6:.2f} M parameters"


def environment(device: torch.device) -> dict[str, str]:
    """On and with what a run was made, for results.json."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU",
        "defeat": defeat_cli.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
