"""Pictures of a study's detectors: what teacher, plain and best distilled student find in the same images, and maps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from defeat_cli.ablation.choice import BASELINE
from defeat_cli.ablation.protocol import LONGER
from defeat_cli.ablation.protocol_page import DETECTIONS, GRADIENTS, PICTURES
from defeat_cli.ablation.study import Study, run_name
from defeat_cli.config import schema as recipes
from defeat_cli.engine.runs import LAST, RECIPE, RunFolder
from defeat_cli.gradients.images import Source
from defeat_cli.gradients.report import Settings
from defeat_cli.jobs.mapping import visualize
from defeat_cli.jobs.opening import open_finder
from defeat_cli.jobs.predicting import find, write_picture
from defeat_cli.session import open_data

IMAGES = 4
MOST_RECALL, SCORE = 0.8, 0.5
"""Boxes are drawn from the score on at which each detector has the highest recall that all have, up to this one, for
beyond it the wrong ones hide the others; and the score where no recall is known."""


def draw_pictures(folder: Path, study: Study, quiet: bool = False) -> None:
    """Write the pictures that `protocol_page` shows to the folder's `pictures`, anew.

    Where the plain or all distilled students are not trained there is nothing to draw.

    Raises:
        DefeatError: a detector or the images cannot be used.
    """
    runs = _runs(study)
    if runs is None:
        return
    best = list(runs.values())[-1]
    recipe = recipes.load(str(best / RECIPE))
    teacher = recipe.teacher.checkpoint
    device = {"run.device": recipe.run.device}
    finders = {name: open_finder(str(run / LAST), None, device) for name, run in runs.items()}
    if teacher is not None:
        finders = {"teacher": open_finder(teacher, None, device), **finders}
    scores = _scores({name: _errors(run) for name, run in runs.items()}, _teacher_errors(best))
    data = open_data(recipe.data, "val", train=False)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    (folder / PICTURES).mkdir(parents=True)
    count = min(IMAGES, len(data))
    paths = [data.images / data.file_name(i * len(data) // count) for i in range(count)]
    for path in paths:
        source = Source(path)
        image = source.read()
        found = [(one, find(one, source, path.stem, image, scores[name])) for name, one in finders.items()]
        titles = [f"{name} (score {scores[name]:.2f})" for name in finders]
        write_picture(folder / PICTURES / f"{DETECTIONS}_{path.stem}.jpg", image, found, titles)
    maps = folder / PICTURES / "gradients"
    changes = {"data.path": recipe.data.path, **device}
    images = [str(path) for path in paths]
    visualize(str(best / LAST), images, maps, Settings(), changes=changes, teacher=teacher, quiet=quiet)
    (maps / GRADIENTS).replace(folder / PICTURES / GRADIENTS)


def _runs(study: Study) -> dict[str, Path] | None:
    """The plain student and the best distilled one by mean AP, each its run on the first seed that both have."""
    found: dict[str, dict[int, float]] = {}
    for outcome in study.outcomes():
        if outcome.results is not None and outcome.variant != LONGER:
            found.setdefault(outcome.variant, {})[outcome.seed] = outcome.evaluations[-1]["AP"]
    plain = found.pop(BASELINE, {})
    best = max(found, key=lambda name: fmean(found[name].values()), default=None)
    seeds = [seed for seed in study.seeds if best is not None and seed in plain and seed in found[best]]
    return {name: study.folder / run_name(name, seeds[0]) for name in (BASELINE, best)} if seeds else None


def _errors(run: Path) -> Mapping[str, Any]:
    evaluations = [entry for entry in RunFolder(run).metrics() if entry["kind"] == "eval"]
    return evaluations[-1].get("errors", {})


def _teacher_errors(run: Path) -> Mapping[str, Any]:
    return (RunFolder(run).results().get("teacher") or {}).get("errors", {})


def _scores(students: Mapping[str, Mapping[str, Any]], teacher: Mapping[str, Any]) -> dict[str, float]:
    """By detector, the score from which on it has the recall that all have."""
    scores = {
        name: {entry["recall"]: entry["score"] for entry in errors.get("background_at_recall", [])}
        for name, errors in {**students, "teacher": teacher}.items()
    }
    common = set.intersection(*(set(reached) for reached in scores.values()))
    recall = max((recall for recall in common if recall <= MOST_RECALL), default=None)
    return {name: SCORE if recall is None else reached[recall] for name, reached in scores.items()}
