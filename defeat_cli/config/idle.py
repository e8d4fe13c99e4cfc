"""Settings that have no effect because of other settings of the same recipe.

A recipe may hold them, for another choice of `optimizer.name` or for a teacher; on the command line they are a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from defeat_cli.config.architecture import DETECTOR_FAMILIES, STRUCTURE, trains_batch_norm, without_effect
from defeat_cli.config.schema import Data, Recipe
from defeat_cli.errors import RecipeError


def refuse_idle(said: Iterable[str], idle: Mapping[str, str]) -> None:
    """Refuse dotted settings of the command line that would be ignored.

    Args:
        idle: settings without effect, by dotted name or a section's, each with the reason.

    Raises:
        RecipeError: names each.
    """
    problems = []
    for key in said:
        reason = next((why for name, why in idle.items() if key == name or key.startswith(f"{name}.")), None)
        if reason is not None:
            problems.append(f"{key}: without effect, as {reason}")
    if problems:
        raise RecipeError("\n  ".join(["the command line has settings that would be ignored:", *problems]))


def idle_in_training(recipe: Recipe) -> dict[str, str]:
    """Settings that leave a training by this recipe as it is."""
    student, optimizer, schedule = recipe.student, recipe.optimizer, recipe.schedule
    idle = idle_in_data(recipe.data)
    names = without_effect(student)
    if student.weights is not None:  # whose reader may ask for it
        names.discard("conventions.channels")
    if student.detector not in DETECTOR_FAMILIES:
        names |= {*STRUCTURE} - {"detector"}
    if not student.detector.startswith("faster"):
        names |= {"head_channels", "proposals_train", "regions_per_image"}
    if not trains_batch_norm(student):
        built = student.detector not in DETECTOR_FAMILIES
        norm = f"that of a {student.detector} is frozen" if built else f"student.norm is {student.norm}"
        idle["student.sync_bn"] = norm
    idle |= {f"student.{name}": f"a {student.detector} does not have it" for name in sorted(names)}
    if optimizer.name == "sgd":
        idle["optimizer.betas"] = "optimizer.name is sgd"
    else:
        idle["optimizer.momentum"] = f"optimizer.name is {optimizer.name}"
    if schedule.decay == "cosine":
        idle |= {f"schedule.{name}": "schedule.decay is cosine" for name in ("milestones", "gamma")}
    if schedule.warmup_steps == 0:
        idle["schedule.warmup_factor"] = "schedule.warmup_steps is 0"
    if recipe.teacher.checkpoint is None and recipe.teacher.recipe is None:
        names = ("teacher.architecture", "teacher.size", "teacher.cache_gib", "distillation")
        names += ("run.teacher_check_images", "run.pull_every")
        idle |= dict.fromkeys(names, "there is no teacher; add --teacher")
    if not recipe.run.compare_plain:
        idle["run.plain_beside"] = "run.compare_plain is false"
    return idle


def idle_in_data(data: Data) -> dict[str, str]:
    """Settings of `data` that leave the images and boxes as they are."""
    idle = {}
    if data.format != "shapes":
        idle["data.shapes"] = f"data.format is {data.format}: nothing is drawn"
    if data.val_fraction is None:
        idle["data.split_seed"] = "data.val_fraction is null: nothing is divided"
    return idle
