"""The training of a session's student: its batches, its checkpoints, and what a step that goes wrong leaves behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from defeat_cli import session as sessions
from defeat_cli.checkpoints import native
from defeat_cli.console import Reporter, percent
from defeat_cli.data.loading import Loader, training_loader
from defeat_cli.data.sharing import StepOrder
from defeat_cli.data.unlabelled import mixed_loader
from defeat_cli.detectors.contract import Detector
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.faults import ADVICE, BadStepError, refuse_broken
from defeat_cli.engine.loop import fit
from defeat_cli.engine.runs import BAD_STEP, LAST, PREVIOUS, RunFolder
from defeat_cli.errors import RunError
from defeat_cli.jobs import bad_step, examples, resuming
from defeat_cli.jobs.estimate import of_training
from defeat_cli.jobs.validating import score
from defeat_cli.memory import told
from defeat_cli.precision import AUTOCAST
from defeat_cli.session import Session
from defeat_cli.tracking import Tracking


def batches_of(session: Session, world: World = ALONE) -> Loader:
    """Training batches of a session, or a process's share of them, with unlabelled images where there are any."""
    recipe, data = session.recipe, session.training_data
    settings = {
        "workers": sessions.loader_processes(recipe.data.workers, world.local_size),
        "share": partial(StepOrder, accumulate=recipe.optimizer.accumulate, rank=world.rank, size=world.size),
        "seed": recipe.run.seed,
    }
    if session.unlabelled is None:
        return training_loader(data, recipe.data.batch_size, **settings)
    beside = recipe.data.unlabelled_a_batch
    return mixed_loader(data, session.unlabelled, recipe.data.batch_size, beside, **settings)


class Checkpoints:
    """Writes a training's checkpoints, in our own format, into its run's folder.

    last_step: the step that last.pt was written at, None where it was not.
    """

    def __init__(self, session: Session, run: RunFolder, world: World) -> None:
        self.session, self.run, self.world = session, run, world
        self.begun_on = resuming.fingerprints(session) if world.is_main else {}
        self.last_step: int | None = None

    def write(self, training: Training, name: str, metrics: dict[str, Any]) -> None:
        """Write one under a name, with the metrics of the last evaluation. All processes call this; one writes.

        Raises:
            RunError: something that trains is not finite.
            OSError: the system refuses.
        """
        refuse_broken(training.distiller, training.step)
        content = {
            "recipe": self.session.recipe.model_dump(),
            "classes": self.session.training_data.classes,
            "student": training.evaluated.model.state_dict(),
            "terms": training.distiller.terms.state_dict(),
            "metrics": metrics,
        }
        # Nobody goes on from best.pt, which would be three times as large.
        state = training.state_dict(self.world) if name == LAST else None
        if not self.world.is_main:
            return
        keep = None
        if state is not None:
            content |= {"training": state, "data": self.begun_on, "log": self.run.log_seal()}
            keep = self.run / PREVIOUS
        try:
            native.save(self.run / name, content, keep)
        except OSError:
            if not (self.run / PREVIOUS).exists() or not (self.run / LAST).exists():
                raise
            (self.run / PREVIOUS).unlink()  # the room that it takes may be what is missing
            native.save(self.run / name, content, keep)
        if name == LAST:
            self.last_step = training.step


def fit_student(
    session: Session,
    run: RunFolder,
    training: Training,
    reporter: Reporter,
    teacher_ap: float | None,
    until: int | None,
    world: World,
    tracking: Tracking,
) -> None:
    """Train a session's student to the last epoch or `until`, saving checkpoints in the run's folder.

    Args:
        teacher_ap: the teacher's AP, where it is known: a student that reaches it is told of.
        until, world: as of `loop.fit`.
        tracking: is given pictures of what the student detects, where the run has trackers.

    Raises:
        RunError: a step was not finite; it is written to the run's folder.
        Interrupted: as `loop.fit`.
    """
    recipe, loader = session.recipe, batches_of(session, world)
    checkpoints = Checkpoints(session, run, world)
    warned = False

    def evaluated(student: Detector) -> dict[str, Any]:
        nonlocal warned
        metrics = score(session, student, reporter, world=world)
        if teacher_ap is not None and metrics["AP"] >= teacher_ap and not warned:
            warned = True
            reporter.warn(
                f"the student (AP {percent(metrics['AP'])}) is as good as its teacher (AP {percent(teacher_ap)}); "
                "a better teacher has more to give"
            )
        if tracking.trackers:
            tracking.pictures = examples.drawn(session, student)
        return metrics

    def needed() -> str:
        training.optimizer.zero_grad(set_to_none=True)
        saved = checkpoints.last_step
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
                save=checkpoints.write,
                reporter=reporter,
                autocast=AUTOCAST[recipe.run.precision],
                until=until,
                world=world,
            )
    except BadStepError as bad:
        raise _told(bad, session, run, training, checkpoints.last_step) from None
    finally:
        reporter.end()


def _told(bad: BadStepError, session: Session, run: RunFolder, training: Training, saved: int | None) -> RunError:
    """What a user is told of a step that was not finite, once it is written to the run's folder."""
    files = [[str(path) for path in session.files_of(ids, targets)] for _, targets, ids in bad.batches]
    recipe = session.recipe.model_dump()
    if session.distiller.cache is None:  # as where the features of all images do not fit, which a step does not tell
        recipe["teacher"]["cache_gib"] = None
    bad_step.write(
        run / BAD_STEP,
        bad,
        training,
        files,
        recipe=recipe,
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
