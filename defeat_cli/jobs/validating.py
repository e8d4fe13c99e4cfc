"""What a session's detectors are worth on its validation images, and what its teacher makes of unlabelled ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from defeat_cli import session as sessions
from defeat_cli.console import Reporter, percent
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.engine.detection_errors import error_report
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.jobs.estimate import of_detecting
from defeat_cli.memory import told
from defeat_cli.precision import AUTOCAST
from defeat_cli.session import Session
from defeat_cli.text import counted

NEAR_ZERO_AP = 0.01


def score(
    session: Session, detector: Detector, reporter: Reporter, *, subset: Any = None, world: World = ALONE
) -> dict[str, Any]:
    """COCO figures and error types of a detector on the session's validation images; on a subset, the figures alone."""
    recipe, data = session.recipe, session.validation_data
    chosen = data if subset is None else subset
    detections: list[dict[str, Any]] = []
    with told(lambda: of_detecting(detector, session.device)), reporter.evaluating(len(chosen)) as advance:
        metrics = evaluate(
            detector,
            chosen,
            workers=sessions.loader_processes(recipe.data.workers, world.local_size),
            autocast=AUTOCAST[recipe.run.precision],
            on_image=advance,
            keep_detections=detections,
            world=world,
        )
    if subset is None:  # else what is in the other images would count as missed
        metrics["errors"] = world.on_main(lambda: error_report(detections, data.coco).to_dict())
    return metrics


def score_teacher(
    session: Session,
    reporter: Reporter,
    known_teacher: Callable[[], dict[str, Any] | None] = lambda: None,
    world: World = ALONE,
) -> float | None:
    """Print the teacher's AP on a few validation images, and return it: a teacher that was read wrongly shows here.

    Where its figures on all of them are known, that is their AP. None where it cannot be known.
    """
    teacher, data = session.teacher, session.validation_data
    images = min(session.recipe.run.teacher_check_images, len(data))
    if teacher is None or not images:
        return None
    if not match_classes(data.classes, teacher.classes):
        reporter.warn("teacher and data share no class name; the teacher's AP cannot be checked")
        return None
    known = world.on_main(known_teacher)
    if known is not None:
        reporter.note(f"teacher: AP {percent(known['AP'])} on the validation images, as another run has found")
        return known["AP"]
    reporter.doing(f"scoring the teacher on {counted(images, 'validation image')}")
    teacher.to(session.device)
    few = torch.utils.data.Subset(data, [i * len(data) // images for i in range(images)])
    ap = score(session, teacher, reporter, subset=few, world=world)["AP"]
    if ap < 0:
        reporter.warn(
            f"teacher: its AP is not known, for there is no box in {counted(images, 'validation image')} that it was "
            "tried on; run.teacher_check_images sets how many they are"
        )
        return None
    reporter.note(f"teacher: AP {percent(ap)} on {counted(images, 'validation image')}")
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
        teacher = replace(teacher, cache=None)  # which is for training, where autocast may be on
        boxes += len(teacher.targets[0]["boxes"])
    threshold = session.recipe.data.unlabelled_threshold
    reporter.note(f"unlabelled: the teacher finds {boxes / images:.1f} boxes an image, on {images} of them")
    if boxes == 0:
        reporter.warn(
            f"the teacher finds nothing with a score of {threshold} on unlabelled images: to terms that need boxes "
            "they are background alone. Lower data.unlabelled_threshold, unless that is what they are"
        )
