"""What of the student goes with what of the teacher: feature levels by stride, classes by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from defeat_cli.errors import DefeatError
from defeat_cli.text import listed

SYNONYMS = {"aeroplane": "airplane", "motorbike": "motorcycle", "tvmonitor": "tv", "sofa": "couch"}
"""Pascal VOC's names, without spaces, to COCO's."""

NO_CLASS = "n/a"
"""How torchvision's COCO weights name the categories that do not exist."""


def match_levels(student_strides: Sequence[int], teacher_strides: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of level indices (student, teacher) of equal stride, in the student's order.

    Levels that share a stride are paired in their order; levels without a partner are left out.
    """
    free = list(enumerate(teacher_strides))
    pairs = []
    for s, stride in enumerate(student_strides):
        partner = next((level for level in free if level[1] == stride), None)
        if partner is not None:
            free.remove(partner)
            pairs.append((s, partner[0]))
    return pairs


def match_classes(
    student_classes: Sequence[str], teacher_classes: Sequence[str], names: Mapping[str, str] | None = None
) -> list[tuple[int, int]]:
    """Pairs of class indices (student, teacher) that mean the same, in the student's order.

    `names` comes first, then equal names, then names that differ in case, in spaces, `_` and `-`, or as VOC's differ
    from COCO's. A class is in one pair at most; `N/A` is in none.

    Args:
        names: teacher class to student class, where names differ.

    Raises:
        DefeatError: an entry of `names` is no class, or gives a class a second partner.
    """
    students = {i: name for i, name in enumerate(student_classes) if name.casefold() != NO_CLASS}
    teachers = {i: name for i, name in enumerate(teacher_classes) if name.casefold() != NO_CLASS}
    pairs = []
    for teacher_name, student_name in (names or {}).items():
        entry = f"distillation.class_map: {teacher_name}: {student_name}"
        t = _index(teacher_name, teachers, f"{entry}: the teacher has no class {teacher_name!r}")
        s = _index(student_name, students, f"{entry}: the student has no class {student_name!r}")
        for index, paired, whose in ((s, {p[0] for p in pairs}, "student"), (t, {p[1] for p in pairs}, "teacher")):
            if index in paired:
                name = student_name if whose == "student" else teacher_name
                raise DefeatError(f"{entry}: the {whose}'s class {name!r} is mapped twice; it can have one partner")
        pairs.append((s, t))
    for form in (str, _canonical):
        pairs += _pair_by(form, students, teachers, pairs)
    return sorted(pairs)


def _pair_by(
    form: Callable[[str], str], students: dict[int, str], teachers: dict[int, str], pairs: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Further pairs of classes whose names have the same form; of several, the first."""
    paired_students, paired_teachers = {s for s, _ in pairs}, {t for _, t in pairs}
    free: dict[str, int] = {}
    for t, name in teachers.items():
        if t not in paired_teachers:
            free.setdefault(form(name), t)
    return [
        (s, free.pop(form(name))) for s, name in students.items() if s not in paired_students and form(name) in free
    ]


def _canonical(name: str) -> str:
    """A name without its case, spaces, `_` and `-`, VOC's turned into COCO's."""
    plain = re.sub(r"[\s_-]+", "", name.casefold()) or name
    return SYNONYMS.get(plain, plain)


def _index(name: str, classes: dict[int, str], problem: str) -> int:
    """Index of the class of this name, or of this name in another form."""
    for form in (str, _canonical):
        for i, known in classes.items():
            if form(known) == form(name):
                return i
    close = difflib.get_close_matches(name, list(classes.values()), n=1)
    raise DefeatError(
        f"{problem} (did you mean {close[0]}?)" if close else f"{problem}; it has {listed(classes.values(), 10)}"
    )
