"""One training step's losses: the student's own, and what the terms add to them (DeFeat, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from defeat_cli.detectors.contract import Detector, Target
from defeat_cli.distillation.terms import Term, View


@dataclass(frozen=True)
class StepLosses:
    """Named losses of one batch, all scalars.

    weighted: what is summed into the total loss; a loss whose weight is 0 is not among them.
    raw: detached values before weight and schedule, for the log; `neck_fg/P3` is the value at one level.
    """

    weighted: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)


class Distiller(nn.Module):
    """A student, the teacher that supervises it, and the terms by which it does.

    `forward` runs both detectors on one batch. The student comes first, and its own sampling with it, so that with
    equal seeds a distilled and a plain student draw the same training samples.

    Args:
        student: the detector that is trained.
        teacher: frozen, in eval mode throughout; None trains the student plainly.
        terms: by name; they may hold parameters of their own, which are trained too.
        own_size: the teacher sees images at its own size, not at the student's.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector | None = None,
        terms: Mapping[str, Term] | None = None,
        *,
        own_size: bool = False,
    ) -> None:
        super().__init__()
        if terms and teacher is None:
            raise ValueError("terms need a teacher")
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self.terms = nn.ModuleDict(terms or {})
        self.own_size = own_size

    def train(self, mode: bool = True) -> Distiller:
        """Switch the student and terms; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def views(self, images: list[Tensor], targets: list[Target]) -> tuple[View, View | None]:
        """The student's and the teacher's look at a batch; see `forward` for the arguments."""
        batch = self.student.prepare(images, targets)
        if self.teacher is None:
            return View(self.student, batch), None
        theirs = self.teacher.prepare(images, targets) if self.own_size else batch
        return View(self.student, batch), View(self.teacher, theirs, frozen=True)

    def forward(
        self, images: list[Tensor], targets: list[Target], strength: float | Mapping[str, float | None] = 1.0
    ) -> StepLosses:
        """Every loss of one batch.

        Args:
            images, targets: as `Detector.prepare` takes them; labels are the student's.
            strength: factor in [0, 1] on the terms, or on each by name; a term whose factor is None is off.
        """
        student, teacher = self.views(images, targets)
        losses = StepLosses()
        for name, value in self.student.losses(student.features, student.batch).items():
            losses.weighted[name] = value
            losses.raw[name] = value.detach()
        for name, term in self.terms.items():
            factor = strength.get(name) if isinstance(strength, Mapping) else strength
            if factor is None:
                continue
            for part, loss in term(student, teacher).items():
                full = f"{name}_{part}" if part else name
                losses.raw[full] = loss.value.detach()
                for detail, value in loss.parts.items():
                    losses.raw[f"{full}/{detail}"] = value
                if loss.weight > 0:
                    losses.weighted[full] = loss.weight * factor * loss.value
        return losses
