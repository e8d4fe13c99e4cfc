"""One `defeat visualize-gradients`: from checkpoints and images to pictures and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from defeat_cli import session
from defeat_cli.checkpoints import native
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.config.architecture import Architecture
from defeat_cli.config.schema import Data, Recipe
from defeat_cli.config.terms import NeckSettings
from defeat_cli.console import counting
from defeat_cli.data.annotations import Annotations, read_annotations
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.detectors.contract import Detector
from defeat_cli.errors import DataError, DefeatError
from defeat_cli.gradients.images import Source, find_images, images_of
from defeat_cli.gradients.maps import neck_adapters
from defeat_cli.gradients.mask_pictures import draw_masks
from defeat_cli.gradients.report import GradientReport, Settings, run_gradient_maps
from defeat_cli.jobs.scoring import recipe_of


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
        settings: weights and scale of the neck term are taken from the recipe instead.
        recipe_name: as in `scoring.score`.
        changes: dotted recipe overrides; with `data.path` among them that data set knows the images' ground truth.
        annotations: COCO file that knows it.
        split: of the data set; limit: most images that are looked at, from the front.
        teacher: checkpoint to put beside.
        teacher_boxes: its detections stand in for ground truth, not the checkpoint's own.

    Raises:
        DefeatError: images, checkpoints or options that cannot be used.
    """
    if teacher is None and (settings.loss == "distillation" or settings.distillation or teacher_boxes):
        raise DefeatError("--distillation and --teacher-boxes need a teacher: add --teacher CHECKPOINT")
    changes = changes or {}
    recipe, found = recipe_of(checkpoint, recipe_name, changes)
    device = session.choose_device(recipe.run.device)
    sources, truth = _images(recipe, images, annotations, "data.path" in changes, split, limit)
    student = _detector(checkpoint, recipe.student if found else None, truth, recipe.data).to(device)
    supervisor, adapters = None, ()
    if teacher is not None:
        theirs, known = recipe_of(teacher, None, {})
        architecture = theirs.student if known else recipe.teacher.architecture
        supervisor = _detector(teacher, architecture, truth, recipe.data).to(device)
        if settings.loss == "distillation" or settings.distillation:
            adapters = neck_adapters(student, supervisor, _trained_adapters(checkpoint), checkpoint)
    neck = recipe.distillation.neck or NeckSettings()
    settings = replace(
        settings,
        alpha_fg=neck.alpha_fg,
        alpha_bg=neck.alpha_bg,
        finest_scale=neck.finest_scale,
    )
    with counting("images", len(sources), quiet) as advance:
        return run_gradient_maps(
            student,
            sources,
            output,
            settings,
            name=checkpoint,
            teacher=supervisor,
            teacher_boxes=teacher_boxes,
            adapters=adapters,
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
    if split not in ("train", "val"):
        raise DataError(f"no split {split!r}; use train or val")
    if not inputs and recipe.data.path is None:
        raise DataError("nothing to look at: give images, or a data folder with --data")
    dataset: DetectionDataset | None = None
    if not inputs or (data_given and file is None):
        dataset = session.open_data(recipe.data, split, train=False)
    if not inputs:
        return images_of(dataset, limit), dataset.annotations
    truth = read_annotations(file) if file is not None else dataset and dataset.annotations
    return find_images(inputs, truth, limit), truth


def _detector(checkpoint: str, architecture: Architecture | None, truth: Annotations | None, data: Data) -> Detector:
    """A checkpoint's detector. Classes without a name anywhere are numbered: nothing here depends on it then."""
    classes = truth and truth.classes
    if classes is None:
        weights = load_weights(checkpoint, architecture)
        classes = weights.classes or [f"class {label}" for label in range(1, weights.num_classes + 1)]
    return session.load_detector(checkpoint, architecture=architecture, classes=classes, data=data).detector


def _trained_adapters(checkpoint: str) -> dict[str, Any] | None:
    """The neck's adapters in a checkpoint of ours; plain weights hold none."""
    if native.recipe_in(Path(checkpoint)) is None:
        return None
    prefix = "neck.adapters."
    terms = native.load(Path(checkpoint)).get("terms", {})
    return {key.removeprefix(prefix): value for key, value in terms.items() if key.startswith(prefix)}


def show_masks(recipe: Recipe, images: Sequence[str], output: Path) -> list[Path]:
    """Draw every mask kind over images, on the levels and anchors of the recipe's student.

    Boxes are the data set's where it knows an image, else the teacher's detections.

    Returns:
        The pictures.

    Raises:
        DefeatError: images, data or teacher that cannot be used, or an image that nothing knows boxes of.
    """
    device = session.choose_device(recipe.run.device)
    truth: Annotations | None = None
    if recipe.data.path is not None:
        splits = [session.open_data(recipe.data, split, train=False).annotations for split in ("val", "train")]
        truth = splits[0]
    else:
        splits = []
    sources = [source for image in images for source in _known(image, splits)]
    student = session.build_student(recipe, truth.classes if truth else ["object"]).to(device)
    neck = recipe.distillation.neck or NeckSettings()
    teacher = None
    if recipe.teacher.checkpoint is not None:
        teacher = _detector(recipe.teacher.checkpoint, recipe.teacher.architecture, truth, recipe.data).to(device)
    return draw_masks(student, sources, output, finest_scale=neck.finest_scale, teacher=teacher)
