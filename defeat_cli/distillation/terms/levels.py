"""What terms that compare feature maps level by level have in common: matching, adapters, the teacher's maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from defeat_cli.detectors.contract import Detector, Level, Stages, at_least_float32, level_names
from defeat_cli.distillation.adapters import adapted
from defeat_cli.distillation.masks import valid_masks
from defeat_cli.distillation.pairing import match_levels
from defeat_cli.distillation.terms.base import Pairing, Term, View


@dataclass(frozen=True)
class Compared:
    """One pair of maps.

    index, name: the student's level, e.g. 1 and `P3`.
    student: [N, C, h, w], adapted to the teacher's channels; teacher: the same, on the student's cells.
    valid: [N, h, w] bool, True on cells that are not padding.
    """

    index: int
    name: str
    student: Tensor
    teacher: Tensor
    valid: Tensor


class LevelTerm(Term):
    """A term over the levels of the neck, or the stages of the backbone, that student and teacher share by stride.

    Attributes:
        pairs: (student, teacher) indices of the levels that are compared.
        adapters: one module a pair, from student to teacher channels.
    """

    strides: ClassVar[tuple[int, ...] | None] = None
    """Strides that are compared; None takes all that are shared."""

    def __init__(
        self, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(student, teacher, class_map=class_map, **settings)
        self.pairs = self.match(student, teacher)
        self.levels, self.teacher_levels = levels_of(student, self.place), levels_of(teacher, self.place)
        self.names = level_names("P" if self.place == "neck" else "C", [level.stride for level in self.levels])
        self.adapters = nn.ModuleList(
            self.adapter(self.levels[s].channels, self.teacher_levels[t].channels) for s, t in self.pairs
        )
        shared = {s for s, _ in self.shared(student, teacher)}
        left_out = [level.stride for i, level in enumerate(self.levels) if i not in shared]
        if left_out and self.strides is None:
            self.notes.append(f"student levels of strides {left_out} have no partner in the teacher, not distilled")

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """What takes the student's map of a level to the teacher's channels; nothing by default."""
        return nn.Identity()

    @classmethod
    def shared(cls, student: Detector, teacher: Detector) -> list[tuple[int, int]]:
        """(student, teacher) indices of the levels of equal stride, among `strides`."""
        of_student, of_teacher = (
            [level.stride for level in levels_of(detector, cls.place)] for detector in (student, teacher)
        )
        pairs = match_levels(of_student, of_teacher)
        return [(s, t) for s, t in pairs if cls.strides is None or of_student[s] in cls.strides]

    @classmethod
    def match(cls, student: Detector, teacher: Detector) -> list[tuple[int, int]]:
        """(student, teacher) indices of the levels that are compared: all that are shared."""
        return cls.shared(student, teacher)

    @classmethod
    def obstacle(
        cls, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> str | None:
        if cls.place == "backbone":
            for role, detector in (("student", student), ("teacher", teacher)):
                if not isinstance(detector, Stages):
                    return f"the {role}'s backbone stages are not known, only its features"
        if not cls.match(student, teacher):
            of_student, of_teacher = (
                [level.stride for level in levels_of(detector, cls.place)] for detector in (student, teacher)
            )
            return (
                f"no level of the teacher (strides {of_teacher}) has the stride of one of the student's ({of_student})"
            )
        return None

    def compared(self, student: View, teacher: View) -> Iterator[Compared]:
        """The pairs of maps of a batch, in float32 at least."""
        ours, theirs = (
            (student.features, teacher.features) if self.place == "neck" else (student.stages, teacher.stages)
        )
        shapes = [tuple(level.shape[-2:]) for level in ours]
        valid = valid_masks(student.batch.valid, shapes, [level.stride for level in self.levels])
        for (s, t), adapter in zip(self.pairs, self.adapters, strict=True):
            here, there = self.levels[s].stride, self.teacher_levels[t].stride
            target = teacher.on_grid_of(student, at_least_float32(theirs[t]), there, shapes[s], here)
            yield Compared(s, self.names[s], adapted(adapter, ours[s]), target, valid[s])

    def pairings(self) -> list[Pairing]:
        partner = {s: (t, adapter) for (s, t), adapter in zip(self.pairs, self.adapters, strict=True)}
        rows = []
        for s, level in enumerate(self.levels):
            t, adapter = partner.get(s, (None, None))
            channels = None if t is None else self.teacher_levels[t].channels
            rows.append(Pairing(level.stride, level.channels, channels, None if t is None else _spoken(adapter)))
        return rows


def levels_of(detector: Detector, place: str) -> list[Level]:
    """Levels of the neck, or stages of the backbone."""
    return detector.levels if place == "neck" else detector.stage_levels


def _spoken(adapter: nn.Module) -> str:
    """An adapter's layers by the shapes of their weights, e.g. `256x64x3x3`."""
    weights = [p for name, p in adapter.named_parameters() if name.endswith("weight") and p.dim() > 1]
    return ", ".join("x".join(map(str, weight.shape)) for weight in weights) or "none"
