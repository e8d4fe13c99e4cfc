"""One `defeat train`: find or train the teacher, train the student, and the plain student where asked, and report."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from defeat_cli import session
from defeat_cli.checkpoints import native
from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe, Teacher
from defeat_cli.console import Reporter, percent
from defeat_cli.data.dataset import CocoDataset
from defeat_cli.data.loading import evaluation_loader, training_loader
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.loading import load_teacher
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.engine.curves import draw_curves
from defeat_cli.engine.detection_errors import error_report
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.engine.loop import Training, fit
from defeat_cli.engine.runs import BEST, CURVES, LAST, RESULTS, STUDENT, RunFolder, write_json
from defeat_cli.errors import DataError

NEAR_ZERO_AP = 0.01


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    title: str = "student",
) -> dict[str, Any]:
    """Run a recipe in a folder, to the end.

    Everything that can be wrong with the input is found before anything is written.

    Returns:
        What `results.json` holds: `student`, and `teacher` and `plain` where there are any, each with COCO figures.

    Raises:
        DefeatError: the recipe, data, teacher, device or folder cannot be used.
        Interrupted: asked to stop; `resume` goes on.
    """
    reporter = Reporter(title, quiet)
    run = RunFolder(folder)
    device = session.choose_device(recipe.run.device, recipe.run.precision)
    run.check(recipe, resume=resume, overwrite=overwrite)
    if resume and run.finished:
        reporter.note(f"{folder}: is finished already")
        return run.results()
    training_data = session.open_data(recipe.data, "train", train=True, seed=recipe.run.seed)
    validation_data = session.open_data(recipe.data, "val", train=False)
    for note in [*training_data.notes, *(f"validation: {note}" for note in validation_data.notes)]:
        reporter.note(note)
    if not validation_data.coco.getAnnIds(iscrowd=False):
        raise DataError("the validation images have no boxes: there is nothing to score on")
    student = session.build_student(recipe, training_data.classes)
    if recipe.student.norm == "frozen" and recipe.student.backbone_weights is None and recipe.student.weights is None:
        reporter.warn("student.norm is frozen and nothing is pretrained, so nothing is normalised; use norm: batch")
    teacher = _teacher(recipe, folder, training_data.classes, overwrite, quiet, reporter)
    distiller = session.build_distiller(recipe.distillation, student, teacher, reporter.warn)
    score = partial(_score, data=validation_data, recipe=recipe, device=device)
    if teacher is not None:
        teacher.to(device)
        check_teacher(teacher, recipe, validation_data, device, reporter)

    run.open(recipe, resume=resume, overwrite=overwrite)
    training = session.build_training(recipe, distiller, device)
    if resume and (run / LAST).is_file():
        training.load_state_dict(native.load(run / LAST)["training"])
    run.forget_after(training.step)
    _fit(recipe, run, training, training_data, score, reporter)

    best = native.load(run / BEST)
    native.write_atomically(run / STUDENT, native.exported(best, str(run / BEST)))
    results: dict[str, Any] = {"student": best["metrics"], "training_seconds": round(training.seconds, 1)}
    if teacher is not None and match_classes(validation_data.classes, teacher.classes):
        results["teacher"] = _teacher_results(recipe, folder) or score(teacher, reporter)
    draw_curves(run.metrics(), run / CURVES)
    if recipe.run.compare_plain and teacher is not None:
        results["plain"] = _sub_run(plain_recipe(recipe), folder / "plain", overwrite, quiet, "plain student")[
            "student"
        ]
    write_json(run / RESULTS, results)
    return results


def plain_recipe(recipe: Recipe) -> Recipe:
    """The same recipe without a teacher."""
    content = recipe.model_dump()
    content["teacher"] = Teacher().model_dump()
    content["run"]["compare_plain"] = False
    return recipes.validate(content, "the plain student's recipe")


def _sub_run(recipe: Recipe, folder: Path, overwrite: bool, quiet: bool, title: str) -> dict[str, Any]:
    """A run that another needs: begun, gone on with, or taken as it is where it is finished."""
    run = RunFolder(folder)
    anew = overwrite and run.exists and not run.holds(recipe)
    return train(recipe, folder, resume=not anew, overwrite=anew, quiet=quiet, title=title)


def obtain_teacher(recipe: Recipe, folder: Path, overwrite: bool = False, quiet: bool = False) -> str | None:
    """The teacher's checkpoint: the recipe's own, or one trained by `teacher.recipe` in `folder/teacher`; else None.

    Raises:
        DefeatError, Interrupted: as `train`.
    """
    if recipe.teacher.checkpoint is not None or recipe.teacher.recipe is None:
        return recipe.teacher.checkpoint
    Reporter("teacher", quiet).note(
        f"no --teacher: training one by the recipe {recipe.teacher.recipe}, in {folder / 'teacher'}"
    )
    teacher_recipe = recipes.load(recipe.teacher.recipe)
    teacher_recipe.data = recipe.data.model_copy(update={"batch_size": teacher_recipe.data.batch_size})
    teacher_recipe.run.device = recipe.run.device
    _sub_run(teacher_recipe, folder / "teacher", overwrite, quiet, "teacher")
    return str(folder / "teacher" / BEST)


def _teacher(
    recipe: Recipe, folder: Path, classes: list[str], overwrite: bool, quiet: bool, reporter: Reporter
) -> Detector | None:
    """The teacher as a detector; None where the recipe has none, or no term needs one."""
    if not recipe.distillation.active:
        return None
    checkpoint = obtain_teacher(recipe, folder, overwrite, quiet)
    if checkpoint is None:
        return None
    loaded = load_teacher(
        checkpoint,
        recipe.teacher.architecture,
        classes=classes,
        sizes=(recipe.data.short_side[-1], recipe.data.long_side),
    )
    loaded.tell(reporter, "teacher: ")
    return loaded.detector


def check_teacher(
    teacher: Detector, recipe: Recipe, data: CocoDataset, device: torch.device, reporter: Reporter
) -> float | None:
    """Print the teacher's AP on a few validation images, and return it: a teacher that was read wrongly shows here."""
    images = min(recipe.run.teacher_check_images, len(data))
    if not images:
        return None
    if not match_classes(data.classes, teacher.classes):
        reporter.warn("teacher and data share no class name; the teacher's AP cannot be checked")
        return None
    few = torch.utils.data.Subset(data, [i * len(data) // images for i in range(images)])
    ap = _score(teacher, reporter, data=data, subset=few, recipe=recipe, device=device)["AP"]
    reporter.note(f"teacher: AP {percent(ap)} on {images} validation images")
    if ap < NEAR_ZERO_AP:
        reporter.warn(
            "the teacher finds next to nothing on these images. Was it trained for these classes, and for images of "
            "this size and kind?"
        )
    return ap


def _score(
    detector: Detector,
    reporter: Reporter,
    *,
    data: CocoDataset,
    recipe: Recipe,
    device: torch.device,
    subset: Any = None,
) -> dict[str, Any]:
    chosen = data if subset is None else subset
    workers = session.loader_processes(recipe.data.workers)
    loader = evaluation_loader(chosen, workers, pin_memory=device.type == "cuda")
    detections: list[dict[str, Any]] = []
    with reporter.evaluating(len(chosen)) as advance:
        metrics = evaluate(
            detector,
            loader,
            data.coco,
            autocast=session.AUTOCAST[recipe.run.precision],
            on_batch=advance,
            keep_detections=detections,
        )
    metrics["errors"] = error_report(detections, data.coco).to_dict()
    return metrics


def _teacher_results(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The figures of a teacher that was trained here on the same data."""
    if recipe.teacher.checkpoint is not None:
        return None
    return RunFolder(folder / "teacher").results()["student"]


def _fit(
    recipe: Recipe,
    run: RunFolder,
    training: Training,
    data: CocoDataset,
    score: Callable[[Detector, Reporter], dict[str, Any]],
    reporter: Reporter,
) -> None:
    """Train to the last epoch, saving checkpoints in our own format."""
    device = next(training.distiller.parameters()).device
    loader = training_loader(
        data,
        recipe.data.batch_size,
        session.loader_processes(recipe.data.workers),
        seed=recipe.run.seed,
        pin_memory=device.type == "cuda",
    )
    accumulate = recipe.optimizer.accumulate
    steps_per_epoch = math.ceil(loader.batch_sampler.batches_per_epoch / accumulate)

    def save(training: Training, name: str, metrics: dict[str, Any]) -> None:
        content = {
            "recipe": recipe.model_dump(),
            "classes": data.classes,
            "student": training.evaluated.model.state_dict(),
            "training": training.state_dict(),
            "metrics": metrics,
        }
        native.save(run / name, content)

    try:
        fit(
            training,
            loader,
            run,
            epochs=recipe.schedule.epochs,
            factor=session.build_lr_factor(recipe.schedule, steps_per_epoch),
            base_lr=recipe.optimizer.lr,
            warmup_steps=recipe.distillation.warmup_steps,
            seed=recipe.run.seed,
            evaluate=lambda detector: score(detector, reporter),
            save=save,
            reporter=reporter,
            accumulate=accumulate,
            clip_norm=recipe.optimizer.clip_norm,
            autocast=session.AUTOCAST[recipe.run.precision],
            evaluate_every=recipe.run.evaluate_every,
            log_every=recipe.run.log_every,
            checkpoint_every=recipe.run.checkpoint_every,
        )
    finally:
        reporter.end()
