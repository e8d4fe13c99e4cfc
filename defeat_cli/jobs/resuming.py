"""Going on with a run: from the newest of its files that are whole, on the data that it was begun on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from defeat_cli.checkpoints import native
from defeat_cli.checkpoints.reading import read
from defeat_cli.config import schema as recipes
from defeat_cli.data.fingerprint import Fingerprint, changes, fingerprint
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.runs import BEST, LAST, METRICS, PREVIOUS, RECIPE, RESULTS, STUDENT, RunFolder
from defeat_cli.errors import CheckpointError, RecipeError, RunError
from defeat_cli.session import Session
from defeat_cli.text import counted


def mend(run: RunFolder, reporter: Any) -> None:
    """Make anew what a run folder lacks or has damaged, as far as other files in it tell what that was.

    Raises:
        RunError: recipe.yaml cannot be read, and nothing else tells what it was.
    """
    try:
        recipes.load(str(run / RECIPE))
    except RecipeError as error:
        reason = str(error) if (run / RECIPE).exists() else f"{run / RECIPE}: missing"
        for name in (LAST, PREVIOUS, BEST):
            try:
                recipe = recipes.validate(native.load(run / name)["recipe"], f"{run / name}: the recipe in it")
            except (CheckpointError, RecipeError):
                continue
            reporter.warn(f"{reason}. The recipe in {name} takes its place")
            recipes.save(recipe, run / RECIPE)
            break
        else:
            raise RunError(f"{reason}. No checkpoint tells what the recipe was; --overwrite begins anew") from None
    if (run / RESULTS).exists() and (run / STUDENT).exists():
        for name, whole in ((RESULTS, run.results), (STUDENT, lambda: read(run / STUDENT))):
            try:
                whole()
            except (RunError, CheckpointError) as error:
                reporter.warn(f"{error}. It is made anew")
                (run / name).unlink()


def newest_state(run: RunFolder, reporter: Any) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is whole; None where nothing was saved yet.

    Where last.pt is missing or damaged, the one before it takes its place.

    Raises:
        RunError: all that there are are damaged.
    """
    damaged = []
    for name in (LAST, PREVIOUS):
        if not (run / name).is_file():
            continue
        try:
            content = native.load(run / name)
            step = content["training"]["step"]
        except CheckpointError as error:
            damaged.append(str(error))
        except (KeyError, TypeError):
            damaged.append(f"{run / name}: holds no state of a training")
        else:
            if name == PREVIOUS:
                reason = damaged[0] if damaged else f"{run / LAST}: missing"
                reporter.warn(f"{reason}. The one before it, of step {step}, takes its place")
                os.replace(run / PREVIOUS, run / LAST)
            return content
    if damaged:
        raise RunError("\n  ".join([*damaged, "nothing is left to go on from; --overwrite begins anew"]))
    return None


def take_up(
    run: RunFolder,
    training: Training,
    session: Session,
    reporter: Any,
    *,
    changed_data: bool = False,
    world: World = ALONE,
) -> None:
    """Bring a training to where its run stands.

    Args:
        changed_data: go on with data that changed, from the start of the epoch where the steps of an epoch did too.
        world: the processes that train together, each of which has to call this; the main one reads the files.

    Raises:
        RunError: no state can be read, or the data changed.
    """
    content = world.on_main(lambda: newest_state(run, reporter))
    if content is None:
        if (run / METRICS).is_file():
            reporter.warn(f"{run.path}: no state of it is saved, so it begins again at step 0")
        world.on_main(lambda: run.forget_after(0, 0))
        return
    before = training.load_state_dict(content["training"], world)
    step = training.step
    if before != world.size:
        reporter.note(f"{run.path}: {counted(before, 'process')} until step {step}, {world.size} from there on")
    different = world.on_main(lambda: changes(content.get("data", {}), fingerprints(session)))
    if different:
        _other_data(run, training, session, different, reporter, changed_data)
    if world.is_main and ("log" not in content or not run.rewind(content["log"])):  # older states have no seal
        run.forget_after(step, training.judged_at)
        if "log" in content:
            reporter.warn(f"{run / METRICS}: not what was written; the lines in it that can be read are kept")
    if training.best_ap > -math.inf and not world.on_main(lambda: _best_is_whole(run, reporter)):
        training.best_ap = -math.inf


def _best_is_whole(run: RunFolder, reporter: Any) -> bool:
    try:
        native.load(run / BEST)
    except CheckpointError as error:
        reporter.warn(f"{error}. The best student from here on takes its place")
        return False
    return True


def best_or_last(run: RunFolder, training: Training, reporter: Any) -> dict[str, Any]:
    """The checkpoint whose student a run has come to: the best one's, the last one's where that cannot be read.

    Raises:
        RunError: neither is there.
    """
    try:
        return native.load(run / BEST)
    except CheckpointError as error:
        reason = str(error)
    last = newest_state(run, reporter)
    if last is None or last["training"]["step"] != training.step or not last["metrics"]:
        raise RunError(f"{reason}. No other file holds what was trained; --resume trains it again from what is saved")
    reporter.warn(f"{reason}. The student of the last epoch is taken in its place")
    native.save(run / BEST, {name: last[name] for name in ("recipe", "classes", "student", "terms", "metrics")})
    return last


def fingerprints(session: Session) -> dict[str, Fingerprint]:
    """What the data of a session is, by what it is for."""
    data = {"training": session.training_data, "validation": session.validation_data, "unlabelled": session.unlabelled}
    return {name: fingerprint(one) for name, one in data.items() if one is not None}


def _other_data(
    run: RunFolder, training: Training, session: Session, different: Sequence[str], reporter: Any, accepted: bool
) -> None:
    if not accepted:
        hint = "bring back the data as it was, or go on all the same with --changed-data, or --overwrite"
        raise RunError("\n  ".join([f"{run.path}: the data is not what this run was begun on:", *different, hint]))
    for text in different:
        reporter.warn(f"the data changed: {text}")
    steps_per_epoch = session.steps // session.recipe.schedule.epochs
    if not training.epochs * steps_per_epoch <= training.step <= (training.epochs + 1) * steps_per_epoch:
        training.step = training.epochs * steps_per_epoch
        reporter.warn(
            f"epochs have {counted(steps_per_epoch, 'step')} now: it goes on with epoch {training.epochs + 1}"
        )
