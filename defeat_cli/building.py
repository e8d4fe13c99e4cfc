"""From a recipe to a student, its teacher and the terms between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe
from defeat_cli.config.terms import TermSettings
from defeat_cli.detectors.backbones import load_backbone_weights
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.loading import load_teacher
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms import TERMS, Term
from defeat_cli.distillation.unlabelled import PseudoLabels
from defeat_cli.errors import RecipeError, TermError


@dataclass(frozen=True)
class Note:
    """A sentence for the user; a warning deserves attention."""

    text: str
    warning: bool = False


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


def build_distiller(
    recipe: Recipe,
    student: Detector,
    checkpoint: str | None,
    supervisor: Detector | None = None,
    *,
    unlabelled: bool = False,
) -> tuple[Distiller, list[Note]]:
    """The student with the teacher and terms that its recipe asks for, and what a user should know of them.

    Args:
        checkpoint: the teacher's. Without one, the teacher of `teacher.recipe` stands there untrained.
        supervisor: that teacher, where it is loaded already.
        unlabelled: whether there are unlabelled images.

    Raises:
        DefeatError: the teacher cannot be read, or the pair cannot have what the recipe asks for.
    """
    notes: list[Note] = []
    has_teacher = checkpoint is not None or recipe.teacher.recipe is not None
    terms, pseudo_labels = {}, None
    if has_teacher and not recipe.distillation.terms:
        use = "inherits from it alone" if recipe.student.inherit else "is trained without its teacher"
        notes.append(Note(f"no term of distillation is on: the student {use}"))
    if has_teacher and (recipe.distillation.terms or recipe.student.inherit):
        if supervisor is None and checkpoint is not None:
            loaded = load_teacher(
                checkpoint,
                recipe.teacher.architecture,
                classes=student.classes,
                sizes=(recipe.data.short_side[-1], recipe.data.long_side),
            )
            supervisor = loaded.detector
            notes += [Note(f"teacher: {text}") for text in loaded.notes]
            notes += [Note(f"teacher: {text}", warning=True) for text in loaded.assumptions]
        elif supervisor is None:
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
        cache_bytes=int(recipe.teacher.cache_gib * 2**30) if recipe.teacher.cache_gib is not None else None,
    )
    return distiller, notes


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
