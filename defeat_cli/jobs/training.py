"""One `defeat train`: find or train the teacher, train the student, and the plain student where asked, and report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from defeat_cli import session as sessions
from defeat_cli.checkpoints import native
from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe, Teacher
from defeat_cli.console import Reporter, counting, percent, spoken_counts
from defeat_cli.data.loading import Loader, training_loader
from defeat_cli.data.unlabelled import mixed_loader
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.engine.checkpoint import Training, begin
from defeat_cli.engine.curves import draw_curves
from defeat_cli.engine.detection_errors import error_report
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.engine.faults import ADVICE, BadStepError, refuse_broken
from defeat_cli.engine.locking import locked, refuse_locked
from defeat_cli.engine.loop import fit
from defeat_cli.engine.runs import BAD_STEP, BEST, CURVES, LAST, PREVIOUS, RESULTS, STUDENT, SUMMARY, RunFolder
from defeat_cli.engine.speed import milliseconds_per_image
from defeat_cli.engine.stopping import stoppable
from defeat_cli.errors import RunError
from defeat_cli.export.loader import write_loader
from defeat_cli.files import write_json
from defeat_cli.jobs import bad_step, resuming
from defeat_cli.jobs.estimate import of_detecting, of_training
from defeat_cli.jobs.summary import write_summary
from defeat_cli.memory import told
from defeat_cli.precision import AUTOCAST
from defeat_cli.session import Session, assemble

NEAR_ZERO_AP = 0.01


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
) -> dict[str, Any]:
    """Run a recipe in a folder, to the end.

    Everything that can be wrong with the input is found before anything is written or trained.

    Args:
        changed_data: resume on data that is not what it was.
        until: epoch after whose evaluation the run stops, saved; None goes on to the last.
        known_teacher: gives the teacher's figures on the validation images where somebody has them already.

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
    has_teacher_run = recipe.teacher.recipe is not None and RunFolder(folder / "teacher").exists
    if resume and not run.exists and not has_teacher_run:
        raise RunError(f"{folder}: holds no run to resume; leave --resume out to start one")
    with stoppable(lambda: _standing(run)):
        refuse_locked(folder)
        if resume and run.exists:
            resuming.mend(run, reporter)
        recipe = sessions.settled(recipe, run.recipe if resume and run.exists else None)
        run.check(recipe, resume=resume, overwrite=overwrite)
        prolonged = resume and run.exists and run.prolonged_by(recipe)
        if prolonged:
            text = f"{folder}: goes on to {recipe.schedule.epochs} epochs, by the learning rates of that schedule"
            reporter.note(text)
        elif resume and run.finished:
            reporter.note(f"{folder}: is finished already; more epochs are possible: --set schedule.epochs=N")
            return run.results()
        watch = partial(counting, quiet=quiet)
        session = assemble(recipe, doing=reporter.doing, watch=watch)
        if not session.teacher_is_trained:
            teacher = train_teacher(recipe, folder, overwrite, quiet, changed_data)
            session = assemble(recipe, teacher=teacher, doing=reporter.doing, watch=watch)
        tell(session, reporter)
        teacher_ap = score_teacher(session, reporter, known_teacher)
        count_pseudo_labels(session, reporter)
        with locked(folder):
            run.open(recipe, resume=resume, overwrite=overwrite)
            training = begin(recipe, session.distiller, session.device)
            if resume:
                resuming.take_up(run, training, session, reporter, changed_data=changed_data)
            if prolonged:
                training.stale = 0  # to go on was asked for
            _fit(session, run, training, reporter, teacher_ap, until)
            results = _finish(session, run, training, reporter, known_teacher)
            if recipe.run.compare_plain and session.teacher is not None:
                plain = _sub_run(plain_recipe(recipe), run / "plain", overwrite, quiet, "plain student", changed_data)
                results["plain"] = plain["student"]
            write_summary(run / SUMMARY, recipe.run.name or folder.name, results)
            write_json(run / RESULTS, results)
            (run / PREVIOUS).unlink(missing_ok=True)
            return results


def _standing(run: RunFolder) -> str:
    """What is said where a run is stopped while no step is under way."""
    return f"{run.path}: {'all steps so far are saved; --resume goes on' if run.exists else 'nothing was trained yet'}"


def _finish(
    session: Session,
    run: RunFolder,
    training: Training,
    reporter: Reporter,
    known_teacher: Callable[[], dict[str, Any] | None],
) -> dict[str, Any]:
    """Write what a finished run leaves, all but its results, which are returned."""
    recipe = session.recipe
    run.log()  # lines that could not be written before
    best = resuming.best_or_last(run, training, reporter)
    native.write_atomically(run / STUDENT, native.exported(best, str(run / BEST)))
    write_loader(run / STUDENT, recipe.student, best["classes"], recipe.data.short_side[-1], recipe.data.long_side)
    results: dict[str, Any] = {"student": best["metrics"], "training_seconds": round(training.seconds, 1)}
    if left_out := images_left_out(session):
        results["left_out"] = left_out
    if training.step < session.steps:
        results["stopped_early_at_step"] = training.step
    timed = {"student": training.evaluated}
    if session.unlabelled is not None:
        text = f"trained on {spoken_counts(training.seen)} images, each time that one was seen"
        reporter.note(f"{reporter.title}: {text}")
        results["seen"] = training.seen
    if session.teacher is not None and match_classes(session.validation_data.classes, session.teacher.classes):
        results["teacher"] = known_teacher()
        if results["teacher"] is None:
            results["teacher"] = score(session, session.teacher, reporter)
            timed["teacher"] = session.teacher
    precision = AUTOCAST[recipe.run.precision]
    # One right after the other, so that whatever else the machine is doing slows both.
    results["ms_per_image"] = {
        who: milliseconds_per_image(detector, session.validation_data, precision) for who, detector in timed.items()
    }
    draw_curves(run.metrics(), run / CURVES, list(session.distiller.terms))
    return results


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
    recipe: Recipe, folder: Path, overwrite: bool, quiet: bool, title: str, changed_data: bool
) -> dict[str, Any]:
    """A run that another needs: begun, gone on with, or taken as it is where it is finished."""
    run = RunFolder(folder)
    recipe = sessions.settled(recipe, run.recipe if run.exists else None)
    anew = overwrite and run.exists and not run.holds(recipe)
    resume = run.exists and not anew
    return train(
        recipe,
        folder,
        resume=resume,
        overwrite=anew,
        changed_data=changed_data and resume,
        quiet=quiet,
        title=title,
    )


def train_teacher(
    recipe: Recipe, folder: Path, overwrite: bool = False, quiet: bool = False, changed_data: bool = False
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
    _sub_run(sessions.teacher_recipe(recipe), folder / "teacher", overwrite, quiet, "teacher", changed_data)
    return str(folder / "teacher" / BEST)


def tell(session: Session, reporter: Reporter) -> None:
    """Print a session's notes."""
    for note in session.notes:
        (reporter.warn if note.warning else reporter.note)(note.text)


def score_teacher(
    session: Session, reporter: Reporter, known_teacher: Callable[[], dict[str, Any] | None] = lambda: None
) -> float | None:
    """Print the teacher's AP on a few validation images, and return it: a teacher that was read wrongly shows here.

    Where its figures on all of them are known, that is their AP.
    """
    teacher, data = session.teacher, session.validation_data
    images = min(session.recipe.run.teacher_check_images, len(data))
    if teacher is None or not images:
        return None
    if not match_classes(data.classes, teacher.classes):
        reporter.warn("teacher and data share no class name; the teacher's AP cannot be checked")
        return None
    known = known_teacher()
    if known is not None:
        reporter.note(f"teacher: AP {percent(known['AP'])} on the validation images, as another run has found")
        return known["AP"]
    reporter.doing(f"scoring the teacher on {images} validation images")
    teacher.to(session.device)
    few = torch.utils.data.Subset(data, [i * len(data) // images for i in range(images)])
    ap = score(session, teacher, reporter, subset=few)["AP"]
    reporter.note(f"teacher: AP {percent(ap)} on {images} validation images")
    if ap < NEAR_ZERO_AP:
        reporter.warn(
            "the teacher finds next to nothing on these images. Was it trained for these classes, and for images of "
            "this size and kind?"
        )
    return ap


def count_pseudo_labels(session: Session, reporter: Reporter) -> None:
    """Print how many boxes the teacher finds on a few unlabelled images: a threshold too high for it shows here."""
    folder, distiller = session.unlabelled, session.distiller.to(session.device)
    images = min(session.recipe.run.teacher_check_images, len(folder)) if folder is not None else 0
    if not images:
        return
    boxes = 0
    for i in range(images):
        image, _, _ = folder[0, i * len(folder) // images]
        _, teacher = distiller.views([image.to(session.device)], None)
        boxes += len(teacher.targets[0]["boxes"])
    threshold = session.recipe.data.unlabelled_threshold
    reporter.note(f"unlabelled: the teacher finds {boxes / images:.1f} boxes an image, on {images} of them")
    if boxes == 0:
        reporter.warn(
            f"the teacher finds nothing with a score of {threshold} on unlabelled images: to terms that need boxes "
            "they are background alone. Lower data.unlabelled_threshold, unless that is what they are"
        )


def score(session: Session, detector: Detector, reporter: Reporter, *, subset: Any = None) -> dict[str, Any]:
    """COCO figures and error types of a detector on the session's validation images, or on some of them."""
    recipe, data = session.recipe, session.validation_data
    chosen = data if subset is None else subset
    detections: list[dict[str, Any]] = []
    with told(lambda: of_detecting(detector, session.device)), reporter.evaluating(len(chosen)) as advance:
        metrics = evaluate(
            detector,
            chosen,
            workers=sessions.loader_processes(recipe.data.workers),
            autocast=AUTOCAST[recipe.run.precision],
            on_image=advance,
            keep_detections=detections,
        )
    metrics["errors"] = error_report(detections, data.coco).to_dict()
    return metrics


def batches_of(session: Session) -> Loader:
    """Training batches of a session, unlabelled images beside them where there are any."""
    recipe, data = session.recipe, session.training_data
    settings = {"workers": sessions.loader_processes(recipe.data.workers), "seed": recipe.run.seed}
    if session.unlabelled is None:
        return training_loader(data, recipe.data.batch_size, **settings)
    beside = recipe.data.unlabelled_a_batch
    return mixed_loader(data, session.unlabelled, recipe.data.batch_size, beside, **settings)


def _fit(
    session: Session,
    run: RunFolder,
    training: Training,
    reporter: Reporter,
    teacher_ap: float | None,
    until: int | None,
) -> None:
    """Train to the last epoch or `until`, saving checkpoints in our own format."""
    recipe, data = session.recipe, session.training_data
    loader = batches_of(session)

    saved: int | None = None
    begun_on = resuming.fingerprints(session)

    def save(training: Training, name: str, metrics: dict[str, Any]) -> None:
        nonlocal saved
        refuse_broken(training.distiller, training.step)
        content = {
            "recipe": recipe.model_dump(),
            "classes": data.classes,
            "student": training.evaluated.model.state_dict(),
            "terms": training.distiller.terms.state_dict(),
            "metrics": metrics,
        }
        keep = None
        if name == LAST:  # nobody goes on from best.pt, which would be three times as large
            content |= {"training": training.state_dict(), "data": begun_on, "log": run.log_seal()}
            keep = run / PREVIOUS
        try:
            native.save(run / name, content, keep)
        except OSError:
            if not (run / PREVIOUS).exists() or not (run / LAST).exists():
                raise
            (run / PREVIOUS).unlink()  # the room that it takes may be what is missing
            native.save(run / name, content, keep)
        if name == LAST:
            saved = training.step

    warned = False

    def evaluated(student: Detector) -> dict[str, Any]:
        nonlocal warned
        metrics = score(session, student, reporter)
        if teacher_ap is not None and metrics["AP"] >= teacher_ap and not warned:
            warned = True
            reporter.warn(
                f"the student (AP {percent(metrics['AP'])}) is as good as its teacher (AP {percent(teacher_ap)}); "
                "a better teacher has more to give"
            )
        return metrics

    def needed() -> str:
        training.optimizer.zero_grad(set_to_none=True)
        kept = f". Step {saved} is saved; --resume goes on from there" if saved is not None else ""
        return of_training(session) + kept

    try:
        with told(needed):
            fit(
                training,
                loader,
                run,
                recipe,
                evaluate=evaluated,
                save=save,
                reporter=reporter,
                autocast=AUTOCAST[recipe.run.precision],
                until=until,
            )
    except BadStepError as bad:
        raise _told(bad, session, run, training, saved) from None
    finally:
        reporter.end()


def _told(bad: BadStepError, session: Session, run: RunFolder, training: Training, saved: int | None) -> RunError:
    """What a user is told of a step that was not finite, once it is written to the run's folder."""
    files = [[str(path) for path in session.files_of(ids, targets)] for _, targets, ids in bad.batches]
    bad_step.write(
        run / BAD_STEP,
        bad,
        training,
        files,
        recipe=session.recipe.model_dump(),
        classes=session.training_data.classes,
        teacher=_absolute(session.checkpoint),
    )
    lines = [f"{bad}. {ADVICE}", *(f"images: {', '.join(names)}" for names in files)]
    lines.append(f"defeat train --replay {run / BAD_STEP} makes this step again, alone")
    if saved == bad.step:
        lines.append(f"the state before it is saved in {run / LAST}; --resume goes on from there")
    return RunError("\n  ".join(lines))


def _absolute(checkpoint: str | None) -> str | None:
    """A checkpoint's path from any folder; a name such as `torchvision:NAME` is left as it is."""
    return str(Path(checkpoint).resolve()) if checkpoint is not None and Path(checkpoint).exists() else checkpoint
