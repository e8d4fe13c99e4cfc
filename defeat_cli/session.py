"""From a recipe to objects: the one place that knows both sides. `train`, `check` and `ablate` use it alike."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from defeat_cli.audit.rules import class_faults
from defeat_cli.config import schema as recipes
from defeat_cli.config.architecture import backbone_name, family
from defeat_cli.config.schema import Data, Recipe
from defeat_cli.config.terms import TermSettings
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.faults import Faults
from defeat_cli.data.formats.shapes import draw_shapes
from defeat_cli.data.opening import open_split
from defeat_cli.data.unlabelled import ImageFolder
from defeat_cli.detectors.backbones import load_backbone_weights
from defeat_cli.detectors.compiling import require_compiler
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.loading import load_teacher
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms import TERMS, Term
from defeat_cli.distillation.unlabelled import PseudoLabels
from defeat_cli.errors import DataError, RecipeError, RunError, TermError
from defeat_cli.precision import choose_precision
from defeat_cli.starting import start_from
from defeat_cli.tracking import require_trackers
from defeat_cli.verifying import Watch, faults_of, notes_on, notes_on_unlabelled, unwatched, verify, verify_unlabelled


@dataclass(frozen=True)
class Note:
    """A sentence for the user; a warning deserves attention."""

    text: str
    warning: bool = False


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
    distiller, remarks = build_distiller(recipe, student, checkpoint, like, unlabelled=unlabelled is not None)
    notes += remarks
    workers = loader_processes(recipe.data.workers)
    if not same_data:  # last, as it takes the longest
        doing("reading every image")
        training_data = verify(training_data, recipe.data, "training", workers, watch)
        validation_data = verify(validation_data, recipe.data, "validation", workers, watch)
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


def build_distiller(
    recipe: Recipe,
    student: Detector,
    checkpoint: str | None,
    like: Session | None = None,
    *,
    unlabelled: bool = False,
) -> tuple[Distiller, list[Note]]:
    """The student with the teacher and terms that its recipe asks for, and what a user should know of them.

    Args:
        checkpoint: the teacher's. Without one, the teacher of `teacher.recipe` stands there untrained.
        like: as of `assemble`.
        unlabelled: whether there are unlabelled images.

    Raises:
        DefeatError: the teacher cannot be read, or the pair cannot have what the recipe asks for.
    """
    notes: list[Note] = []
    has_teacher = checkpoint is not None or recipe.teacher.recipe is not None
    supervisor, terms, pseudo_labels = None, {}, None
    if has_teacher and not recipe.distillation.terms:
        use = "inherits from it alone" if recipe.student.inherit else "is trained without its teacher"
        notes.append(Note(f"no term of distillation is on: the student {use}"))
    if has_teacher and (recipe.distillation.terms or recipe.student.inherit):
        as_said = checkpoint == recipe.teacher.checkpoint
        if as_said and like is not None and like.teacher is not None and like.recipe.teacher == recipe.teacher:
            supervisor = like.teacher
        elif checkpoint is not None:
            loaded = load_teacher(
                checkpoint,
                recipe.teacher.architecture,
                classes=student.classes,
                sizes=(recipe.data.short_side[-1], recipe.data.long_side),
            )
            supervisor = loaded.detector
            notes += [Note(f"teacher: {text}") for text in loaded.notes]
            notes += [Note(f"teacher: {text}", warning=True) for text in loaded.assumptions]
        else:
            supervisor = build_student(teacher_recipe(recipe), student.classes)
        if recipe.teacher.size == "student":
            notes += _shown_at_size_of(student, supervisor)
        notes += inherit(recipe.student.inherit, student, supervisor)
        if recipe.distillation.terms:
            terms, remarks = build_terms(
                recipe.distillation.terms,
                student,
                supervisor,
                class_map=recipe.distillation.class_map,
                own_size=recipe.teacher.size == "own",
            )
            notes += remarks
        if unlabelled:
            pseudo_labels = PseudoLabels(
                student, supervisor, recipe.data.unlabelled_threshold, recipe.distillation.class_map
            )
            if not pseudo_labels.pairs:
                text = "teacher and student share no class: unlabelled images have no boxes, as if all were background"
                notes.append(Note(text, warning=True))
    distiller = Distiller(
        student,
        supervisor if terms else None,
        terms,
        own_size=recipe.teacher.size == "own",
        balance=recipe.distillation.balance,
        pseudo_labels=pseudo_labels,
    )
    return distiller, notes


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
        raise RunError(f"run.device: {name} was asked for, but this machine has {found} CUDA devices; use auto or cpu")
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


def build_student(recipe: Recipe, classes: list[str]) -> Detector:
    """The student with its backbone's weights. Its random weights depend on `run.seed` alone.

    Raises:
        CheckpointError: `backbone_weights` do not fit.
    """
    torch.manual_seed(recipe.run.seed)
    student = build_detector(
        recipe.student, classes, short_side=recipe.data.short_side, long_side=recipe.data.long_side
    )
    if recipe.student.backbone_weights is not None:
        load_backbone_weights(student.model, recipe.student.backbone_weights, recipe.student)
    return student


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the teacher that `teacher.recipe` names, on this recipe's data and device."""
    own = recipes.load(recipe.teacher.recipe)
    own.data = recipe.data.labelled_only().model_copy(update={"batch_size": own.data.batch_size})
    own.run.device, own.run.track = recipe.run.device, recipe.run.track
    return own


def build_terms(
    sections: Mapping[str, TermSettings],
    student: Detector,
    teacher: Detector,
    class_map: Mapping[str, str] | None = None,
    own_size: bool = False,
) -> tuple[dict[str, Term], list[Note]]:
    """The terms of a pair by name, and what a user should know of them.

    A term that a pair can do without is left out where the pair cannot have it, and that is a warning.

    Raises:
        TermError: the pair cannot have a term, or is left without any; says why.
    """
    terms, notes = {}, []
    for name, kind in TERMS.items():
        if name not in sections:
            continue
        settings = vars(sections[name])
        try:
            term = kind(student, teacher, class_map=class_map, **settings)
            if own_size and term.own_size_obstacle is not None:
                raise TermError(f"teacher.size: own: {term.own_size_obstacle}")
        except TermError as reason:
            if not kind.dispensable:
                raise TermError(f"distillation.{name}: {reason}") from None
            notes.append(Note(f"{name} distillation is off: {reason}", warning=True))
            continue
        terms[name] = term
        notes += [Note(text, warning=True) for text in term.notes]
    if not terms:
        reasons = "; ".join(note.text for note in notes)
        raise TermError(f"nothing is left to distil ({reasons}). Switch another term on, or train without a teacher")
    return terms, notes


def inherit(parts: Sequence[str], student: Detector, teacher: Detector) -> list[Note]:
    """Start parts of the student (`neck`, `head`) as the teacher's, tensor by tensor where names and shapes agree.

    Raises:
        RecipeError: nothing of a part agrees.
    """
    notes = []
    ours, theirs = student.model.state_dict(), teacher.model.state_dict()
    for part in parts:
        is_neck = part == "neck"
        names = [n for n in ours if not n.startswith("backbone.body.") and n.startswith("backbone.") is is_neck]
        shared = [name for name in names if name in theirs and theirs[name].shape == ours[name].shape]
        if not shared:
            raise RecipeError(
                f"student.inherit: the teacher's {part} is another one, no tensor of it has the shape of the student's"
            )
        student.model.load_state_dict({**ours, **{name: theirs[name] for name in shared}})
        ours = student.model.state_dict()
        notes.append(Note(f"student: starts with the teacher's {part}, {len(shared)} of its {len(names)} tensors"))
    return notes


def _shown_at_size_of(student: Detector, teacher: Detector) -> list[Note]:
    """Let the teacher resize images as the student does at evaluation: it is scored on what it supervises on."""
    ours, theirs = student.model.transform, teacher.model.transform
    before = (theirs.min_size[-1], theirs.max_size)
    theirs.min_size, theirs.max_size = (ours.min_size[-1],), ours.max_size
    if before == (theirs.min_size[-1], theirs.max_size):
        return []
    return [
        Note(
            f"teacher: sees images at the student's size, short side {theirs.min_size[-1]} and long side "
            f"{theirs.max_size}; its own is {before[0]} and {before[1]} (teacher.size: own)"
        )
    ]
