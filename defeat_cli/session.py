"""From a recipe to objects: the one place that knows both sides. `train`, `check` and `ablate` use it alike."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from defeat_cli.audit.rules import class_faults
from defeat_cli.building import Note, build_distiller, build_student
from defeat_cli.config.architecture import backbone_name, family
from defeat_cli.config.schema import Data, Recipe
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.faults import Faults
from defeat_cli.data.formats.shapes import draw_shapes
from defeat_cli.data.opening import open_split
from defeat_cli.data.unlabelled import ImageFolder
from defeat_cli.detectors.compiling import require_compiler
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.caching import bytes_of_maps
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms.levels import levels_of
from defeat_cli.errors import DataError, RecipeError, RunError
from defeat_cli.precision import AUTOCAST, choose_precision
from defeat_cli.starting import start_from
from defeat_cli.text import counted, spoken_size
from defeat_cli.tracking import require_trackers
from defeat_cli.verifying import Watch, faults_of, notes_on, notes_on_unlabelled, unwatched, verify, verify_unlabelled


@dataclass
class Session:
    """Everything that a run of a recipe is made of.

    teacher: None where the student is trained plainly.
    unlabelled: images without annotations that the terms see too; None where there are none, or no terms.
    teacher_is_trained: False while the recipe's own teacher is still to be trained; `teacher` then has random weights.
    notes: what a user should know before the run, in order.
    checkpoint: the teacher's, where it has one.
    """

    recipe: Recipe
    device: torch.device
    training_data: DetectionDataset
    validation_data: DetectionDataset
    student: Detector
    teacher: Detector | None
    distiller: Distiller
    unlabelled: ImageFolder | None = None
    teacher_is_trained: bool = True
    notes: list[Note] = field(default_factory=list)
    checkpoint: str | None = None

    def files_of(self, ids: Sequence, targets: Sequence) -> list[Path]:
        """The image files of a training batch."""
        return [
            self.unlabelled.folder / name if target is None else self.training_data.file_of(name)
            for name, target in zip(ids, targets, strict=True)
        ]

    @property
    def steps(self) -> int:
        """Optimizer steps from the first to the last."""
        batches = math.ceil(len(self.training_data) / self.recipe.data.batch_size)
        return self.recipe.schedule.epochs * math.ceil(batches / self.recipe.optimizer.accumulate)


def assemble(
    recipe: Recipe,
    teacher: str | None = None,
    like: Session | None = None,
    doing: Callable[[str], None] = lambda text: None,
    watch: Watch = unwatched,
) -> Session:
    """Data, student, teacher and terms of a recipe. Nothing is trained, and nothing written but drawn data.

    Args:
        teacher: checkpoint in place of the recipe's. Without one a teacher that the recipe is to train first
            (`teacher.recipe`) stands there untrained, so that what cannot work is found before it is trained.
        like: a session whose data and teacher serve again where the recipe names the same, as in a study.
        doing: told of each thing that may take a while, before it is begun.
        watch: shows how far the reading of images is.

    Raises:
        DefeatError: something that the recipe names cannot be used. All that `train` refuses is refused here.
    """
    recipe = settled(recipe)
    device = choose_device(recipe.run.device)
    require_trackers(recipe.run.track)
    if recipe.run.compile:
        require_compiler(device)
    checkpoint = teacher or recipe.teacher.checkpoint
    has_teacher = checkpoint is not None or recipe.teacher.recipe is not None
    if not has_teacher:
        _refuse_without_teacher(recipe)
    same_data = like is not None and (like.recipe.data, like.recipe.run.seed) == (recipe.data, recipe.run.seed)
    training_data, validation_data, notes = _open_splits(recipe, like if same_data else None, doing)
    about_data = len(notes)
    if recipe.run.compile and device.type == "cpu":
        text = "run.compile: torch's compiler has crashed on CPUs, without a message, in small networks; it is for GPUs"
        notes.append(Note(text, warning=True))
    doing(f"building the student, a {family(recipe.student)} on {backbone_name(recipe.student)}")
    student, remarks = _begin_student(recipe, training_data.classes)
    notes += remarks
    unlabelled = None
    if recipe.data.unlabelled is not None and recipe.distillation.terms:
        unlabelled = _open_unlabelled(recipe, training_data, like)
    elif recipe.data.unlabelled is not None:
        notes.append(Note("data.unlabelled: no term of distillation is on, so these images are not used"))
    if checkpoint is not None:
        doing(f"reading the teacher {checkpoint}")
    known = None
    if like is not None and like.recipe.teacher == recipe.teacher and checkpoint == recipe.teacher.checkpoint:
        known = like.teacher
    distiller, remarks = build_distiller(recipe, student, checkpoint, known, unlabelled=unlabelled is not None)
    notes += remarks
    workers = loader_processes(recipe.data.workers)
    if not same_data:  # last, as it takes the longest
        doing("reading every image")
        training_data = verify(training_data, recipe.data, "training", workers, watch)
        validation_data = verify(validation_data, recipe.data, "validation", workers, watch)
    if distiller.cache is not None:
        notes.append(_fit_cache(recipe, distiller, training_data, unlabelled))
    told = notes_on(training_data, validation_data, recipe.data, student)
    if unlabelled is not None:
        if like is None or unlabelled is not like.unlabelled:
            unlabelled = verify_unlabelled(unlabelled, recipe.data, workers, watch)
        told += notes_on_unlabelled(unlabelled, recipe.data, training_data, validation_data)
    notes[about_data:about_data] = [Note(text, warning) for text, warning in told]
    return Session(
        recipe,
        device,
        training_data,
        validation_data,
        student,
        distiller.teacher,
        distiller,
        unlabelled,
        checkpoint is not None or not has_teacher,
        notes,
        checkpoint,
    )


def _refuse_without_teacher(recipe: Recipe) -> None:
    """Refuse what only a teacher gives a meaning to."""
    if recipe.run.compare_plain:
        raise RecipeError("run.compare_plain compares with a student without a teacher, and this one has none")
    if recipe.student.inherit:
        raise RecipeError("student.inherit: there is no teacher to inherit from; give one with --teacher")
    if recipe.data.unlabelled is not None:
        raise RecipeError("data.unlabelled: there is no teacher to learn from on these images; give one by --teacher")


def _open_splits(
    recipe: Recipe, like: Session | None, doing: Callable[[str], None]
) -> tuple[DetectionDataset, DetectionDataset, list[Note]]:
    """The training and validation data, those of `like` where it is given, and what a user should know of them."""
    notes = []
    if like is not None:
        training_data, validation_data = like.training_data, like.validation_data
    else:
        doing(f"reading {recipe.data.path or 'the data'}")
        drawn = recipe.data.format == "shapes" and recipe.data.path and not Path(recipe.data.path).exists()
        training_data = open_data(recipe.data, "train", train=True, seed=recipe.run.seed)
        validation_data = open_data(recipe.data, "val", train=False)
        if drawn:
            notes.append(Note(f"{recipe.data.path}: a new folder; the data set of shapes was drawn there"))
    for opened in (training_data, validation_data):
        opened.refuse_vanishing(recipe.data.short_side, recipe.data.long_side)
    Faults().tell(class_faults(training_data, validation_data))
    return training_data, validation_data, notes


def _begin_student(recipe: Recipe, classes: list[str]) -> tuple[Detector, list[Note]]:
    """The student as it starts, and what a user should know of that."""
    student, settings, notes = build_student(recipe, classes), recipe.student, []
    if settings.weights is not None:
        lines = start_from(student, settings.weights, settings)
        notes += [Note(f"student: {text}", warning=True) for text in lines]
    if settings.norm == "frozen" and settings.backbone_weights is None and settings.weights is None:
        text = "student.norm is frozen and nothing is pretrained, so nothing is normalised; use norm: batch"
        notes.append(Note(text, warning=True))
    return student, notes


def _fit_cache(
    recipe: Recipe, distiller: Distiller, training_data: DetectionDataset, unlabelled: ImageFolder | None
) -> Note:
    """Keep the teacher's maps of all images, or none: the rest would cost more than without a cache, one by one."""
    teacher, place = distiller.teacher, distiller.cache.place
    short_sides, long_side = recipe.data.short_side, recipe.data.long_side
    if distiller.own_size:
        transform = teacher.model.transform
        short_sides, long_side = transform.min_size[-1:], transform.max_size
    sizes = [*training_data.sizes, *(unlabelled.sizes if unlabelled is not None else [])]
    needed = 0
    for short_side in short_sides:
        scales = [min(short_side / min(size), long_side / max(size)) for size in sizes]
        shown = [(round(h * scale), round(w * scale)) for (h, w), scale in zip(sizes, scales, strict=True)]
        needed += bytes_of_maps(levels_of(teacher, place), shown, teacher.divisible, AUTOCAST[recipe.run.precision])
    mirrored = 0 < recipe.data.flip < 1
    needed *= 1 + mirrored
    limit = recipe.teacher.cache_gib
    images = f"{counted(len(sizes), 'image')}{', as they are and mirrored,' if mirrored else ''}"
    what = "features" if place == "neck" else "backbone stages"
    text = f"teacher: its {what} of {images} take {spoken_size(needed)}"
    if needed > limit * 2**30:
        distiller.cache = None
        return Note(f"{text}: more than teacher.cache_gib {limit:g}, so none is kept")
    return Note(f"{text} and are kept (teacher.cache_gib {limit:g})")


def choose_device(name: str, precision: str = "fp32") -> torch.device:
    """The device of a name; `auto` takes CUDA where there is one.

    Raises:
        RunError: CUDA asked for where there is none, or a precision that the device does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"run.device: no device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"run.device: {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = counted(found, "CUDA device")
        raise RunError(f"run.device: {name} was asked for, but this machine has {devices}; use auto or cpu")
    choose_precision(precision, device)
    return device


def settled(recipe: Recipe, begun: Recipe | None = None) -> Recipe:
    """The recipe with the precision that `auto` stands for.

    Args:
        begun: the recipe of a run that is gone on with, whose precision is kept.

    Raises:
        RunError: a device or precision that is not there.
    """
    device = choose_device(recipe.run.device, recipe.run.precision)
    precision = recipe.run.precision
    if precision == "auto" and begun is not None:
        try:
            precision = choose_precision(begun.run.precision, device)
        except RunError as reason:
            advice = "go on with it on such a device, or begin another"
            raise RunError(f"the run was begun in {begun.run.precision}: {advice} ({reason})") from None
    elif precision == "auto":
        precision = choose_precision("auto", device)
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"precision": precision})})


def loader_processes(workers: int, beside: int = 1) -> int:
    """`data.workers`, but no more than there are CPU cores; `beside`: processes of this machine that have them each."""
    return min(workers, max(1, (os.cpu_count() or 1) // beside))


def open_data(data: Data, split: str, *, train: bool, seed: int = 0, faults: Faults | None = None) -> DetectionDataset:
    """One split of the recipe's data; draws the embedded data set first where that is asked for.

    Args:
        faults: is told of what is wrong; None does as `data.on_bad_image` says.

    Raises:
        DataError: no data, or data that cannot be used.
    """
    if data.path is None:
        raise DataError("no data: give a folder with --data, or data.path in the recipe")
    if data.format == "shapes":
        draw_shapes(Path(data.path), **data.shapes.model_dump())
    named = "train" if data.val_fraction is not None and split != "test" else split
    return open_split(
        Path(data.path),
        split,
        format="coco" if data.format == "shapes" else data.format,
        annotations=getattr(data, f"{named}_annotations", None),
        images=getattr(data, f"{named}_images", None),
        train=train,
        flip=data.flip if train else 0.0,
        seed=seed,
        val_fraction=data.val_fraction,
        split_seed=data.split_seed,
        classes=data.classes,
        faults=faults or faults_of(data),
    )


def _open_unlabelled(recipe: Recipe, training_data: DetectionDataset, like: Session | None) -> ImageFolder:
    """The images without annotations."""
    data = recipe.data
    if like is not None and like.unlabelled is not None and like.training_data is training_data:
        folder = like.unlabelled
    else:
        folder = ImageFolder(Path(data.unlabelled), training_data.transforms, recipe.run.seed, faults_of(data))
    folder.refuse_vanishing(data.short_side, data.long_side)
    return folder
