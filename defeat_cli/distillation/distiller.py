"""One training step's losses: the student's own, and what the terms add to them (DeFeat, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from defeat_cli.detectors.contract import Detector, Stages, Target
from defeat_cli.distillation.balance import Balance, pulls
from defeat_cli.distillation.caching import FeatureCache
from defeat_cli.distillation.terms import Loss, Term, View
from defeat_cli.distillation.unlabelled import PseudoLabels, apart, averaged
from defeat_cli.errors import TermError


@dataclass(frozen=True)
class StepLosses:
    """Named losses of one batch, all scalars.

    weighted: what is summed into the total loss; a loss whose weight is 0 is not among them.
    raw: detached values before weight and schedule, for the log; `neck_fg/P3` is the value at one level.
    pull: how strongly each term pulls at full weight; see `balance.pulls`. Empty where it was not asked for.
    """

    weighted: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)
    pull: dict[str, Tensor] = field(default_factory=dict)


class Distiller(nn.Module):
    """A student, the teacher that supervises it, and the terms by which it does.

    `forward` runs both detectors on one batch. Of all that is drawn at random the student's samples come first, so that
    with equal seeds a distilled and a plain student draw the same.

    Args:
        student: the detector that is trained.
        teacher: frozen, in eval mode throughout; None trains the student plainly.
        terms: by name; they may hold parameters of their own, which are trained too.
        own_size: the teacher sees images at its own size, not at the student's.
        balance: the pull that every term is to have, by a factor on its weight that is measured in the first steps;
            None leaves the weights as they are.
        pseudo_labels: what stands for the targets of unlabelled images; None takes the default ones.
        cache_bytes: in which the teacher's features are kept from one batch to another, or its backbone stages where a
            term works on them; None keeps nothing.

    Raises:
        TermError: `own_size` with a term that cannot have it.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector | None = None,
        terms: Mapping[str, Term] | None = None,
        *,
        own_size: bool = False,
        balance: float | None = None,
        pseudo_labels: PseudoLabels | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if terms and teacher is None:
            raise ValueError("terms need a teacher")
        for name, term in (terms or {}).items():
            if own_size and term.own_size_obstacle is not None:
                raise TermError(f"teacher.size: own: distillation.{name} cannot have it: {term.own_size_obstacle}")
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self.terms = nn.ModuleDict(terms or {})
        self.own_size = own_size
        place = "backbone" if any(term.place == "backbone" for term in self.terms.values()) else "neck"
        self.cache = FeatureCache(cache_bytes, place) if cache_bytes is not None and terms else None
        self.balance = Balance(list(self.terms), balance) if balance is not None and terms else None
        if pseudo_labels is None and teacher is not None:
            pseudo_labels = PseudoLabels(student, teacher)
        self.pseudo_labels = pseudo_labels

    def train(self, mode: bool = True) -> Distiller:
        """Switch the student and terms; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def views(self, images: list[Tensor], targets: list[Target] | None) -> tuple[View, View | None]:
        """The student's and the teacher's look at a batch.

        Args:
            images, targets: as `Detector.prepare` takes them; without targets, `pseudo_labels` finds them where a view
                is asked for them.
        """
        batch = self.student.prepare(images, targets)
        if self.teacher is None:
            return View(self.student, batch), None
        theirs = self.teacher.prepare(images, targets) if self.own_size else batch
        if targets is not None:
            return View(self.student, batch), View(self.teacher, theirs, frozen=True, cache=self.cache)
        teacher = View(self.teacher, theirs, frozen=True, find=self.pseudo_labels, cache=self.cache)
        return View(self.student, batch, find=teacher.targets_in), teacher

    def forward(
        self,
        images: list[Tensor],
        targets: list[Target | None],
        strength: float | Mapping[str, float | None] = 1.0,
        *,
        measure: bool = False,
    ) -> StepLosses:
        """Every loss of one batch.

        The detection losses are those of the labelled images. Unlabelled ones go through both detectors in a batch of
        their own, after all that is done for the labelled ones; each loss of a term is the mean of its values on both
        batches, by their numbers of images.

        Args:
            images, targets: as `Detector.prepare` takes them; labels are the student's. The target of an unlabelled
                image is None; at least one image is labelled.
            strength: factor in [0, 1] on the terms, or on each by name; a term whose factor is None is off.
            measure: fill in `pull` too, which takes a backward pass through the heads for each term. Needs gradients.
                A balance wants it where `balancing` says so. Pulls are measured on the labelled images.
        """
        images, targets, unlabelled = apart(images, targets)
        student, teacher = self.views(images, targets)
        factors = {name: strength.get(name) if isinstance(strength, Mapping) else strength for name in self.terms}
        factors = {name: factor for name, factor in factors.items() if factor is not None}
        if factors:
            _begin(teacher)
        losses = StepLosses()
        for name, value in student.detector.losses(student.features, student.batch).items():
            losses.weighted[name] = value
            losses.raw[name] = value.detach()
        detection = list(losses.weighted.values())
        computed = {name: self.terms[name](student, teacher) for name in factors}
        if computed and measure:
            losses.pull.update(_pulls(student, detection, computed))
        if computed and unlabelled:
            views, share = self.views(unlabelled, None), len(unlabelled) / (len(images) + len(unlabelled))
            _begin(views[1])
            computed = {name: averaged(parts, self.terms[name](*views), share) for name, parts in computed.items()}
        gains = self._gains(losses.pull)
        for name, parts in computed.items():
            for part, loss in parts.items():
                full = f"{name}_{part}" if part else name
                losses.raw[full] = loss.value.detach()
                for detail, value in loss.parts.items():
                    losses.raw[f"{full}/{detail}"] = value
                if loss.weight > 0:
                    weighted = loss.weight * factors[name] * loss.value
                    losses.weighted[full] = gains[name] * weighted if name in gains else weighted
        return losses

    def balancing(self, step: int, warmup_steps: int = 0) -> bool:
        """Whether a balance measures pulls at a step, counted from 0; see `TermSettings.measured_at`."""
        return self.balance is not None and any(t.settings.measured_at(step, warmup_steps) for t in self.terms.values())

    def _gains(self, pull: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors on the terms' weights; none without a balance."""
        if self.balance is None:
            return {}
        if self.training:
            self.balance.add(pull)
        return self.balance.factors()


def _begin(teacher: View) -> None:
    """Compute what every term asks of a teacher, which draws no random number.

    Before the student: what the layers on the way take is freed then before the student's activations are there, which
    are kept for the backward pass.
    """
    in_parts = isinstance(teacher.detector, Stages) and (teacher.cache is None or teacher.cache.place == "backbone")
    teacher.look_at(["stages" if in_parts else "features"])


def _pulls(student: View, detection: list[Tensor], computed: Mapping[str, Mapping[str, Loss]]) -> dict[str, Tensor]:
    """The pull of each term at full weight, at the student's features or else at its backbone stages."""
    together = {name: sum(loss.weight * loss.value for loss in parts.values()) for name, parts in computed.items()}
    places = [student.features, *([student.stages] if isinstance(student.detector, Stages) else [])]
    return pulls(sum(detection), together, *places)
