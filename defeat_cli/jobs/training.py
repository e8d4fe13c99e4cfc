"""One `defeat train`: find or train the teacher, train the student, and the plain student where asked, and report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from defeat_cli import session as sessions
from defeat_cli.building import Note, teacher_recipe
from defeat_cli.checkpoints import native
from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe, Teacher
from defeat_cli.console import Reporter, counting, spoken_counts
from defeat_cli.data.sharing import pieces
from defeat_cli.detectors.contract import TorchvisionDetector
from defeat_cli.distillation.map_folder import MapFolder
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.engine.checkpoint import Training, begin
from defeat_cli.engine.curves import draw_curves
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.locking import locked, refuse_locked
from defeat_cli.engine.monitor import seen
from defeat_cli.engine.runs import BEST, CURVES, PREVIOUS, RESULTS, STUDENT, SUMMARY, RunFolder
from defeat_cli.engine.speed import milliseconds_per_image
from defeat_cli.engine.stopping import stoppable
from defeat_cli.errors import RunError
from defeat_cli.export.loader import write_loader
from defeat_cli.files import write_json
from defeat_cli.jobs import reporting, resuming
from defeat_cli.jobs.beside import beside, threads_beside
from defeat_cli.jobs.fitting import fit_student
from defeat_cli.jobs.summary import write_summary
from defeat_cli.jobs.validating import count_pseudo_labels, score, score_teacher
from defeat_cli.jobs.watching import watched
from defeat_cli.precision import AUTOCAST
from defeat_cli.session import Session, assemble
from defeat_cli.text import counted


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    changed_data: bool = False,
    quiet: bool = False,
    title: str = "student",
    until: int | None = None,
    known_teacher: Callable[[], dict[str, Any] | None] = lambda: None,
    world: World = ALONE,
    features: Path | None = None,
) -> dict[str, Any]:
    """Run a recipe in a folder, to the end.

    Everything that can be wrong with the input is found before anything is written or trained.

    Args:
        changed_data: resume on data that is not what it was.
        until: epoch after whose evaluation the run stops, saved; None goes on to the last.
        known_teacher: gives the teacher's figures on the validation images where somebody has them already.
        world: the processes that train together, each of which has to call this. Only the main one uses the folder.
        features: folder in which the runs of a study keep the teacher's features for each other.

    Returns:
        What `results.json` holds: `student`, and `teacher` and `plain` where there are any, each with COCO figures.

    Raises:
        DefeatError: the recipe, data, teacher, device or folder cannot be used.
        Interrupted: asked to stop, or at `until`; `resume` goes on.
    """
    reporter = Reporter(title, quiet)
    run = RunFolder(folder)
    if resume and overwrite:
        raise RunError("--resume and --overwrite contradict each other; give one of them")
    if changed_data and not resume:
        raise RunError("--changed-data: is about a run that is resumed; add --resume")
    with stoppable(lambda: _standing(run)):
        world.on_main(lambda: _enter(run, recipe, reporter, resume))
        recipe = _settled(recipe, run if resume else None, world)
        done = world.on_main(lambda: _look(run, recipe, reporter, resume, overwrite))
        if done is not None:
            return done
        prolonged = world.on_main(lambda: resume and run.exists and run.prolonged_by(recipe))
        session = assemble_together(recipe, world, reporter)
        if not session.teacher_is_trained:
            teacher = train_teacher(recipe, folder, overwrite, quiet, changed_data, world)
            session = assemble_together(recipe, world, reporter, teacher)
        if features is not None:
            _share_features(session, features)
        tell(session, reporter)
        tell_share(recipe, world, reporter)
        teacher_ap = score_teacher(session, reporter, known_teacher, world)
        count_pseudo_labels(session, reporter)
        plain = plain_recipe(recipe) if recipe.run.compare_plain and session.teacher is not None else None
        threads = threads_beside(recipe, session.device, world.size, reporter) if plain is not None else 0
        with locked(folder) if world.is_main else nullcontext() as lock:
            world.on_main(lambda: run.open(recipe, resume=resume, overwrite=overwrite))
            training = begin(recipe, session.distiller, session.device, world)
            if resume:
                resuming.take_up(run, training, session, reporter, changed_data=changed_data, world=world)
            if prolonged:
                training.stale = 0  # to go on was asked for
            ahead = plain if not changed_data else None  # a worker does not take data that is not what it was
            with beside(RunFolder(run / "plain"), ahead, threads, reporter, overwrite=overwrite, lock=lock) as other:
                with watched(session, run, reporter, world) as tracking:
                    fit_student(session, run, training, reporter, teacher_ap, until, world, tracking)
                    results = _finish(session, run, training, reporter, known_teacher, world)
                if plain is not None:
                    found = other.results() or _sub_run(
                        plain, run / "plain", overwrite, quiet, "plain student", changed_data, world
                    )
                    results["plain"] = found["student"]
            if world.is_main:
                write_summary(run / SUMMARY, recipe.run.name or folder.name, results)
                reporting.write_pages(session, run, results)
                write_json(run / RESULTS, results)
                (run / PREVIOUS).unlink(missing_ok=True)
            return world.on_all(results)


def _enter(run: RunFolder, recipe: Recipe, reporter: Reporter, resume: bool) -> None:
    """Make sure that a folder can be worked in, and that what it says of its own run can be read."""
    has_teacher_run = recipe.teacher.recipe is not None and RunFolder(run / "teacher").exists
    if resume and not run.exists and not has_teacher_run:
        raise RunError(f"{run.path}: holds no run to resume; leave --resume out to start one")
    refuse_locked(run.path)
    if resume and run.exists:
        resuming.mend(run, reporter)


def _settled(recipe: Recipe, run: RunFolder | None, world: World) -> Recipe:
    """A recipe with the precision that it is run with: that of a run which is gone on with, or the device's."""

    def precision() -> str:
        return sessions.settled(recipe, run.recipe if run is not None and run.exists else None).run.precision

    settled = recipe.run.model_copy(update={"precision": world.on_main(precision)})
    return recipe.model_copy(update={"run": settled})


def _look(run: RunFolder, recipe: Recipe, reporter: Reporter, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Find out whether a recipe can be run in a folder; its results where that has been done already."""
    run.check(recipe, resume=resume, overwrite=overwrite)
    if resume and run.exists and run.prolonged_by(recipe):
        text = (
            f"{run.path}: goes on to {counted(recipe.schedule.epochs, 'epoch')}, by the learning rates of that schedule"
        )
        reporter.note(text)
    elif resume and run.finished:
        reporter.note(f"{run.path}: is finished already; more epochs are possible: --set schedule.epochs=N")
        return run.results()
    return None


def assemble_together(recipe: Recipe, world: World, reporter: Reporter, teacher: str | None = None) -> Session:
    """A session on every process, with what processes that share its batches have to have.

    Raises:
        DefeatError: as `assemble`; or these processes cannot share the recipe's device or its batches.
    """
    watch = partial(counting, quiet=reporter.quiet)
    session = world.main_first(lambda: assemble(recipe, teacher=teacher, doing=reporter.doing, watch=watch))
    world.check_device(session.device)
    pieces(recipe.data.batch_size, recipe.optimizer.accumulate, world.size)
    if recipe.student.sync_bn and world.size > 1:
        if session.device.type != "cuda":
            raise RunError("student.sync_bn: torch has it for CUDA devices only; leave it out on the CPU")
        session.student.model = nn.SyncBatchNorm.convert_sync_batchnorm(session.student.model)
    elif recipe.student.sync_bn:
        text = "student.sync_bn: without effect in one process; --gpus N trains in several"
        session.notes.append(Note(text, warning=True))
    return session


def _share_features(session: Session, folder: Path) -> None:
    """Look for the teacher's features where the other runs of a study keep theirs, if they would be the same there.

    On a GPU they are computed sooner than written; compiled code may round otherwise, and of a wrapped network not all
    that decides its features is known.
    """
    cache, teacher = session.distiller.cache, session.teacher
    exact = session.device.type == "cpu" and not session.recipe.run.compile and isinstance(teacher, TorchvisionDetector)
    if cache is not None and exact:
        cache.folder = MapFolder(folder, teacher, cache.place)


def _standing(run: RunFolder) -> str:
    """What is said where a run is stopped while no step is under way."""
    return f"{run.path}: {'all steps so far are saved; --resume goes on' if run.exists else 'nothing was trained yet'}"


def _finish(
    session: Session,
    run: RunFolder,
    training: Training,
    reporter: Reporter,
    known_teacher: Callable[[], dict[str, Any] | None],
    world: World,
) -> dict[str, Any]:
    """Write what a finished run leaves, all but its results, which are returned."""
    results = {"student": world.on_main(lambda: _export(session, run, training, reporter)["metrics"])}
    results["training_seconds"] = round(training.seconds + training.spared, 1)
    results["environment"] = reporting.environment(session.device)
    if left_out := images_left_out(session):
        results["left_out"] = left_out
    if training.step < session.steps:
        results["stopped_early_at_step"] = training.step
    timed = {"student": training.evaluated}
    if session.unlabelled is not None:
        results["seen"] = world.on_all(seen(training, world))
        text = f"trained on {spoken_counts(results['seen'])} images, each time that one was seen"
        reporter.note(f"{reporter.title}: {text}")
    if session.teacher is not None and match_classes(session.validation_data.classes, session.teacher.classes):
        results["teacher"] = world.on_main(known_teacher)
        if results["teacher"] is None:
            results["teacher"] = score(session, session.teacher, reporter, world=world)
            timed["teacher"] = session.teacher
    precision = AUTOCAST[session.recipe.run.precision]
    if world.is_main:
        # One right after the other, so that whatever else the machine is doing slows both.
        results["ms_per_image"] = {
            who: milliseconds_per_image(detector, session.validation_data, precision) for who, detector in timed.items()
        }
        draw_curves(run.metrics(), run / CURVES, list(session.distiller.terms))
    return results


def _export(session: Session, run: RunFolder, training: Training, reporter: Reporter) -> dict[str, Any]:
    """Write the best epoch's student for plain torchvision; its checkpoint."""
    recipe = session.recipe
    run.log()  # lines that could not be written before
    best = resuming.best_or_last(run, training, reporter)
    native.write_atomically(run / STUDENT, native.exported(best, str(run / BEST)))
    write_loader(run / STUDENT, recipe.student, best["classes"], recipe.data.short_side[-1], recipe.data.long_side)
    return best


def images_left_out(session: Session) -> dict[str, list[str]]:
    """The files that `data.on_bad_image: skip` left out, of the splits that have any."""
    splits = {"training": session.training_data, "validation": session.validation_data}
    if session.unlabelled is not None:
        splits["unlabelled"] = session.unlabelled
    return {name: [str(fault.image) for fault in data.left_out] for name, data in splits.items() if data.left_out}


def plain_recipe(recipe: Recipe) -> Recipe:
    """The same recipe without a term. The teacher stays where the student inherits from it: so must the plain one."""
    content = recipes.merged(recipe.model_dump(), {recipes.ONLY: [], "run.compare_plain": False})
    content["data"] = recipe.data.labelled_only().model_dump()
    if not recipe.student.inherit:
        content["teacher"] = Teacher().model_dump()
    return recipes.validate(content, "the plain student's recipe")


def _sub_run(
    recipe: Recipe, folder: Path, overwrite: bool, quiet: bool, title: str, changed_data: bool, world: World
) -> dict[str, Any]:
    """A run that another needs: begun, gone on with, or taken as it is where it is finished."""
    run = RunFolder(folder)
    recipe = _settled(recipe, run, world)
    anew = world.on_main(lambda: overwrite and run.exists and not run.holds(recipe))
    resume = world.on_main(lambda: run.exists) and not anew
    return train(
        recipe,
        folder,
        resume=resume,
        overwrite=anew,
        changed_data=changed_data and resume,
        quiet=quiet,
        title=title,
        world=world,
    )


def train_teacher(
    recipe: Recipe,
    folder: Path,
    overwrite: bool = False,
    quiet: bool = False,
    changed_data: bool = False,
    world: World = ALONE,
) -> str:
    """Train the teacher that `teacher.recipe` names, in `folder/teacher`, where it is not there yet.

    Returns:
        Its checkpoint.

    Raises:
        DefeatError, Interrupted: as `train`.
    """
    Reporter("teacher", quiet).note(
        f"no --teacher: training one by the recipe {recipe.teacher.recipe}, in {folder / 'teacher'}"
    )
    _sub_run(teacher_recipe(recipe), folder / "teacher", overwrite, quiet, "teacher", changed_data, world)
    return str(folder / "teacher" / BEST)


def tell(session: Session, reporter: Reporter) -> None:
    """Print a session's notes."""
    for note in session.notes:
        (reporter.warn if note.warning else reporter.note)(note.text)


def tell_share(recipe: Recipe, world: World, reporter: Reporter) -> None:
    """Print how a step is shared out; nothing for a process alone."""
    if world.size == 1:
        return
    size, batches = recipe.data.batch_size, recipe.optimizer.accumulate
    cut = pieces(size, batches, world.size)
    parts = f"{batches} batches of {size}" if batches > 1 else f"a batch of {size}"
    cutting = f", each cut into {cut}" if cut > 1 else ""
    reporter.note(
        f"{world.size} processes share each step's {size * batches} images ({parts}{cutting}), which optimizer.lr "
        f"{recipe.optimizer.lr:g} is for"
    )
