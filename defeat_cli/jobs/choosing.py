"""A recipe where none was named: what there is, looked at; and what was chosen for it, told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from defeat_cli import session
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.config import schema as recipes
from defeat_cli.config.choosing import Facts, choose
from defeat_cli.config.commenting import commented
from defeat_cli.config.given import COMMAND_LINE, given_settings
from defeat_cli.config.schema import Recipe
from defeat_cli.console import Reporter
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.detectors.backbones import can_have_imagenet
from defeat_cli.detectors.loading import hint
from defeat_cli.errors import DataError, RecipeError
from defeat_cli.files import replacing
from defeat_cli.verifying import recipe_anchor_fit


def choose_recipe(said: Mapping[str, Any], reporter: Reporter) -> Recipe:
    """A recipe for the data, teacher and device of the command line; what was chosen is told, with the reasons.

    Args:
        said: dotted settings that the recipe is to have.

    Raises:
        DefeatError: data, teacher or device cannot be used, or what was said.
    """
    facts = look(said, reporter)
    choice = choose(facts, said)
    reporter.note(f"no --recipe, so one is chosen: {choice.name}, for {facts}")
    for reason in choice.reasons:
        if not reason.minor:
            reporter.note(f"  {reason}")
    return choice.recipe()


def write_recipe(said: Mapping[str, Any], path: Path | None, reporter: Reporter) -> Path:
    """Write the recipe that would be chosen, with its reasons as comments.

    Args:
        said: as for `choose_recipe`.
        path: of the file; None takes the data set's name, in the current folder.

    Returns:
        Its path.

    Raises:
        DefeatError: as `choose_recipe`; or the file is there already.
    """
    name = Path(str(said.get("data.path", "recipe"))).resolve().stem
    path = path or Path(f"{name}.yaml")
    if path.exists():
        raise RecipeError(f"{path}: is there already; remove it, or name another file with --output")
    facts = look(said, reporter)
    text = commented(choose(facts, said), facts, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def look(said: Mapping[str, Any], reporter: Reporter) -> Facts:
    """What there is.

    Raises:
        DefeatError: no data; or data, teacher or device that cannot be used.
    """
    recipe = recipes.validate(recipes.merged({}, dict(said)), COMMAND_LINE)
    if recipe.data.path is None:
        raise DataError("no data to choose a recipe for: add --data FOLDER, or name a recipe with --recipe")
    device = session.choose_device(recipe.run.device, recipe.run.precision)
    reporter.doing(f"looking at {recipe.data.path}")
    data = session.open_data(recipe.data, "train", train=True)
    return replace(facts_of(data, recipe, device.type), **_teacher(recipe, said), pretrained=can_have_imagenet)


def facts_of(data: DetectionDataset, recipe: Recipe, device: str) -> Facts:
    """What there is to know of training images, which have boxes, for a device; nothing of teachers or weights."""
    sides = np.sqrt(np.prod(np.maximum(data.annotations.boxes[:, 2:], 1.0), axis=1))
    height, width = (int(side) for side in np.median(np.array(data.sizes), axis=0))
    return Facts(
        device=device,
        cores=os.cpu_count() or 1,
        data=Path(recipe.data.path).resolve().name,
        images=len(data),
        size=(height, width),
        small_box=float(np.quantile(sides, 0.1)),
        usual_box=float(np.median(sides)),
        anchor_fit=partial(recipe_anchor_fit, data=data),
    )


def _teacher(recipe: Recipe, said: Mapping[str, Any]) -> dict[str, Any]:
    """What `Facts` tell of the teacher."""
    checkpoint = recipe.teacher.checkpoint
    if checkpoint is not None:
        given = given_settings(recipes.merged({}, dict(said)), COMMAND_LINE)
        weights = load_weights(checkpoint, hint(given, "teacher.architecture"))
        return {"teacher": weights.architecture, "teacher_side": weights.short_side}
    if recipe.teacher.recipe is not None:
        own = recipes.load(recipe.teacher.recipe)
        return {"teacher": own.student, "teacher_side": own.data.short_side[-1]}
    return {}
