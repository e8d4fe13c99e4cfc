"""One `defeat visualize-gradients`: from checkpoints and images to pictures and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from defeat_cli import session
from defeat_cli.building import build_student
from defeat_cli.checkpoints import native
from defeat_cli.checkpoints.loading import TORCHVISION_PREFIX, file_of
from defeat_cli.checkpoints.reading import read
from defeat_cli.config.architecture import TRAINING
from defeat_cli.config.given import COMMAND_LINE, given_settings
from defeat_cli.config.idle import refuse_idle
from defeat_cli.config.schema import Distillation, Recipe, merged, validate
from defeat_cli.config.terms import NeckSettings
from defeat_cli.console import Reporter, counting
from defeat_cli.data.annotations import Annotations, read_annotations
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.detectors.loading import load_detector, load_teacher
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.errors import DataError, DefeatError, RecipeError
from defeat_cli.files import require_place_for_file, require_place_for_folder
from defeat_cli.gradients.images import Source, find_images, images_of
from defeat_cli.gradients.mask_pictures import draw_masks
from defeat_cli.gradients.panels import panel_terms
from defeat_cli.gradients.report import SUMMARIES, GradientReport, Settings, run_gradient_maps
from defeat_cli.jobs.asked import DETECTOR, Asked, ask, data_settings
from defeat_cli.jobs.estimate import of_detecting
from defeat_cli.memory import told


def visualize(
    checkpoint: str,
    images: Sequence[str],
    output: Path,
    settings: Settings,
    *,
    recipe_name: str | None = None,
    changes: dict[str, Any] | None = None,
    annotations: Path | None = None,
    split: str = "val",
    limit: int | None = None,
    teacher: str | None = None,
    teacher_boxes: bool = False,
    quiet: bool = False,
) -> GradientReport:
    """Draw and measure the gradients of a checkpoint's neck; see `run_gradient_maps` for what it writes.

    Args:
        images: files, folders or glob patterns; none takes the data set's.
        settings: the recipe's `finest_scale` takes the place of theirs.
        recipe_name: as in `scoring.score`.
        changes: dotted recipe overrides; with `data.path` among them that data set knows the images' ground truth.
        annotations: COCO file that knows it.
        split: of the data set; limit: most images that are looked at, from the front.
        teacher: checkpoint to put beside.
        teacher_boxes: its detections stand in for ground truth, not the checkpoint's own.

    Raises:
        DefeatError: images, checkpoints or options that cannot be used.
    """
    require_place_for_folder(output)
    for name in SUMMARIES:
        require_place_for_file(output / name)
    if teacher is None and (settings.distils or teacher_boxes):
        raise DefeatError("--distillation and --teacher-boxes need a teacher: add --teacher CHECKPOINT")
    if settings.distils:
        said = given_settings(merged({}, changes or {}), COMMAND_LINE)
        refuse_idle(said, {"distillation.neck.mask": "the neck term is shown as its variants, each with its mask"})
    asked = ask(
        checkpoint,
        recipe_name,
        changes or {},
        command="gradmap",
        settings=_effective(data_settings(split, changes or {}), teacher, settings.distils or settings.own_level),
    )
    recipe, reporter = asked.recipe, Reporter("gradmap", quiet)
    device = session.choose_device(recipe.run.device)
    sources, truth = _images(recipe, images, annotations, "data.path" in (changes or {}), split, limit)
    loaded = load_detector(asked.weights, asked.given, classes=truth and truth.classes, ignored=NOT_DRAWN)
    for note in asked.notes:
        reporter.note(note)
    loaded.tell(reporter)
    student = loaded.detector.to(device)
    distillation = _distillation(asked)
    neck = distillation.neck or NeckSettings()
    if settings.distils or settings.own_level:
        settings = replace(settings, finest_scale=neck.finest_scale)
    supervisor = distiller = None
    if teacher is not None:
        loaded = load_detector(
            teacher,
            asked.given,
            section="teacher.architecture",
            classes=truth and truth.classes,
            sizes=(loaded.meaning.short_side, loaded.meaning.long_side),
            ignored=NOT_DRAWN,
        )
        loaded.tell(reporter, "teacher: ")
        supervisor = loaded.detector.to(device)
        if settings.distils:
            terms = panel_terms(distillation, student, supervisor, _trained_terms(checkpoint), checkpoint)
            distiller = Distiller(student, supervisor, terms, own_size=recipe.teacher.size == "own")
    doing = partial(of_detecting, student, device, "computing gradients")
    with told(doing), counting("images", len(sources), quiet) as advance:
        return run_gradient_maps(
            student,
            sources,
            output,
            settings,
            about={"checkpoint": checkpoint, "alpha_fg": neck.alpha_fg, "alpha_bg": neck.alpha_bg},
            teacher=supervisor,
            teacher_boxes=teacher_boxes,
            distiller=distiller,
            advance=advance,
        )


def _known(image: str, splits: Sequence[Annotations]) -> list[Source]:
    """An image, or a folder's, with the boxes that the splits have of it; without boxes where none knows it."""
    found = []
    for known in splits:
        with suppress(DataError):
            found += find_images([image], known)
    return found or find_images([image])


def _images(
    recipe: Recipe, inputs: Sequence[str], file: Path | None, data_given: bool, split: str, limit: int | None
) -> tuple[list[Source], Annotations | None]:
    """The images, and the annotations that know them where there are such."""
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit}: must be at least 1")
    if not inputs and recipe.data.path is None:
        raise DataError("nothing to look at: give images, or a data folder with --data")
    dataset: DetectionDataset | None = None
    if not inputs or (data_given and file is None):
        dataset = session.open_data(recipe.data, split, train=False)
    if not inputs:
        return images_of(dataset, limit), dataset.annotations
    truth = read_annotations(file) if file is not None else dataset and dataset.annotations
    return find_images(inputs, truth, limit), truth


NOT_DRAWN = ("norm", "frozen_stages")
"""Settings of training that the gradients of a loss do not depend on; samplers depend on the others."""


def _effective(data: list[str], teacher: str | None, has_term: bool) -> list[str]:
    """Settings that have an effect on the pictures."""
    known = [*DETECTOR, *data, "run.device"]
    known += [f"student.{name}" for name in TRAINING if name not in NOT_DRAWN]
    known += ["teacher.architecture"] if teacher is not None else []
    return known + (["distillation"] if has_term else [])


def _distillation(asked: Asked) -> Distillation:
    """The neck term's settings: what was said, over what the checkpoint remembers in today's form."""
    remembered = (asked.weights.recipe or {}).get("distillation") or {}
    spoken = {name: value for name, (value, _) in asked.given.items() if name.startswith("distillation.")}
    try:
        return validate(merged({"distillation": remembered}, spoken), "the checkpoint's recipe").distillation
    except RecipeError:  # it may be of an earlier form
        return asked.recipe.distillation


def _trained_terms(checkpoint: str) -> dict[str, Any]:
    """What terms have learned, in a checkpoint of ours; other files hold nothing of them."""
    if checkpoint.startswith(TORCHVISION_PREFIX):
        return {}
    content = read(file_of(checkpoint))
    return content.get("terms", {}) if native.matches(content) else {}


def show_masks(recipe: Recipe, images: Sequence[str], output: Path) -> list[Path]:
    """Draw every mask kind over images, on the levels and anchors of the recipe's student.

    Boxes are the data set's where it knows an image, else the teacher's detections.

    Returns:
        The pictures.

    Raises:
        DefeatError: images, data or teacher that cannot be used, or an image that nothing knows boxes of.
    """
    require_place_for_folder(output)
    device = session.choose_device(recipe.run.device)
    truth: Annotations | None = None
    if recipe.data.path is not None:
        splits = [session.open_data(recipe.data, split, train=False).annotations for split in ("val", "train")]
        truth = splits[0]
    else:
        splits = []
    sources = [source for image in images for source in _known(image, splits)]
    student = build_student(recipe, truth.classes if truth else ["object"]).to(device)
    neck = recipe.distillation.neck or NeckSettings()
    teacher = None
    if recipe.teacher.checkpoint is not None:
        classes = truth and truth.classes
        sizes = (recipe.data.short_side[-1], recipe.data.long_side)
        loaded = load_teacher(recipe.teacher.checkpoint, recipe.teacher.architecture, classes=classes, sizes=sizes)
        loaded.tell(Reporter("masks"), "teacher: ")
        teacher = loaded.detector.to(device)
    with told(partial(of_detecting, student, device, "drawing masks")):
        return draw_masks(student, sources, output, finest_scale=neck.finest_scale, teacher=teacher)
