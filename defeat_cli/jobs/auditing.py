"""`defeat check --data` without a recipe: a data set gone through for all that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from defeat_cli import session
from defeat_cli.audit.auditing import Audit, as_values, audit
from defeat_cli.audit.sheet import draw_sheet
from defeat_cli.audit.summary import facts, in_words
from defeat_cli.config.choosing import choose
from defeat_cli.config.given import understood
from defeat_cli.config.idle import idle_in_data, refuse_idle
from defeat_cli.config.schema import Recipe
from defeat_cli.console import counting, new_table
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.faults import Faults
from defeat_cli.data.known import cache_folder
from defeat_cli.data.verification import Verifier
from defeat_cli.errors import DataError
from defeat_cli.files import replacing
from defeat_cli.jobs.asked import SOURCE
from defeat_cli.jobs.choosing import facts_of
from defeat_cli.verifying import recipe_anchor_fit

EFFECTIVE = (
    *(f"data.{name}" for name in (*SOURCE, "short_side", "long_side", "workers", "verify")),
    *(f"student.{name}" for name in ("detector", "anchor_sizes", "anchor_ratios")),
)
"""Settings that a look at the data alone does not ignore."""
EXAMPLES, LISTED = 5, 1000
"""Places of each problem that are printed, and that `--json` has."""
MOST_CLASSES = 40


@dataclass(frozen=True)
class Looked:
    """What was found: the result, and the same as plain values."""

    result: Audit
    values: dict[str, Any]

    @property
    def total(self) -> int:
        """How many places are at fault."""
        return sum(problem["count"] for problem in self.values["problems"])

    def lines(self) -> Iterator[str]:
        """What a user sees, apart from tables."""
        for name, figures in self.values["splits"].items():
            yield f"{name}: {in_words(figures)}" if figures["images"] else f"{name}: no image that can be used"
        yield from self.values["notes"]
        if (anchors := self.values["anchors"]) is not None:
            yield anchors["said"]

    def problems(self) -> Iterator[tuple[str, list[str]]]:
        """A title for each problem, and its first places."""
        folder = f"{self.values['path']}{os.sep}"
        for problem in self.values["problems"]:
            fate = "stops a training" if problem["stops_training"] else "suspicious"
            title = f"{problem['what']}: {problem['count']} in {problem['split']} ({fate})"
            places = [text.removeprefix(folder) for text in problem["examples"][:EXAMPLES]]
            rest = problem["count"] - len(places)
            yield title, [*places, *([f"and {rest} more"] if rest else [])]

    def class_table(self) -> Table:
        """How many boxes each class has in each split."""
        splits = self.values["splits"]
        names = list(dict.fromkeys(name for figures in splits.values() for name in figures["classes"]))
        totals = {name: sum(figures["classes"].get(name, 0) for figures in splits.values()) for name in names}
        names.sort(key=lambda name: -totals[name])
        rows = [[name, *(str(of["classes"].get(name, 0)) for of in splits.values())] for name in names[:MOST_CLASSES]]
        if len(names) > MOST_CLASSES:
            rows.append([f"and {len(names) - MOST_CLASSES} more", *[""] * len(splits)])
        return new_table("Boxes of each class", ["class", *splits], rows)


def look(changes: Mapping[str, Any]) -> Looked:
    """Go through the data set that `data.path` names.

    Args:
        changes: dotted recipe overrides of the command line.

    Raises:
        DefeatError: no data set there, one that cannot be read at all, or a setting without effect.
    """
    recipe, said = understood(None, changes, "check --data", EFFECTIVE)
    refuse_idle(said, idle_in_data(recipe.data))
    if recipe.data.path is None:
        raise DataError("no data: give a folder with --data")
    workers = recipe.data.workers if "data.workers" in said else os.cpu_count() or 1
    verifier = Verifier(recipe.data.verify == "full", session.loader_processes(workers), cache_folder())
    result = audit(partial(_open, recipe), verifier, counting)
    to_train, origin = _to_train(recipe, said, result)
    sides = (to_train.data.short_side[-1], to_train.data.long_side)
    values = {
        "path": str(Path(recipe.data.path)),
        "clean": result.clean,
        "splits": {name: {**facts(data, *sides), "layout": data.layout} for name, data in result.splits.items()},
        "problems": as_values(result, LISTED),
        "anchors": _anchors(to_train, origin, result),
        "notes": result.notes,
    }
    return Looked(result, values)


def write_sheet(looked: Looked, path: Path) -> int:
    """Draw what is suspicious into a PNG; returns how many tiles it has."""
    picture, tiles = draw_sheet(looked.result.by_rule())
    if tiles:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            picture.save(temporary, "PNG")
    return tiles


def _open(recipe: Recipe, split: str, faults: Faults) -> DetectionDataset:
    return session.open_data(recipe.data, split, train=split == "train", faults=faults)


def _to_train(recipe: Recipe, said: Mapping[str, Any], result: Audit) -> tuple[Recipe, str]:
    """The recipe whose sizes and anchors boxes are judged by, and whose it is, for people: that which `train` would
    choose here; the given one where there are no boxes to choose it for."""
    data = _judged(result)
    if not len(data.boxes[0]):
        return recipe, ""
    device = session.choose_device(recipe.run.device).type
    chosen = choose(facts_of(data, recipe, device), {key: value for key, (value, _) in said.items()}).recipe()
    return chosen, f"as `train` would have it on {'a GPU' if device == 'cuda' else 'a CPU'}: "


def _judged(result: Audit) -> DetectionDataset:
    """The split that a detector would be trained on; where there is none, what there is."""
    return result.splits.get("train") or next(iter(result.splits.values()))


def _anchors(recipe: Recipe, origin: str, result: Audit) -> dict[str, Any] | None:
    """How the anchors of a recipe's student fit the boxes; None where there are none.

    Args:
        origin: whose recipe it is.
    """
    data = _judged(result)
    fitting = recipe_anchor_fit(recipe, data) if len(data.boxes[0]) else None
    if fitting is None:
        return None
    short_side = recipe.data.short_side[-1]
    return {
        "detector": recipe.student.detector,
        "sizes": recipe.student.anchor_sizes,
        "resized_to": [short_side, recipe.data.long_side],
        "mean_best_iou": round(fitting.mean, 4),
        "better_sizes": fitting.sizes,
        "better_mean_best_iou": fitting.better and round(fitting.better, 4),
        "said": f"{origin}anchors of {recipe.student.detector}, images resized to {short_side}: {fitting.in_words()}",
    }
