"""Numbers that go wrong in training: steps that are not finite, losses that explode, and what is done about them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from defeat_cli.distillation.distiller import Distiller, StepLosses
from defeat_cli.engine.gradients import Gradients
from defeat_cli.errors import RunError
from defeat_cli.text import counted

EXPLODED, EXPLODED_STEPS = 1000.0, 20
"""A training has diverged where the sum of its losses, before weights, is so many times what it was at first (or 1, if
that is more), for so many steps in a row. Losses of detectors start at a few units and fall; a bad batch, or a learning
rate that is only too high, makes them some ten times as large for a while."""
LOWEST_SCALE = 1.0
"""Gradients that overflow at a loss scale above this are the scaler's affair: it halves the scale and goes on."""
ADVICE = (
    "Lower optimizer.lr or optimizer.clip_norm, or lengthen schedule.warmup_steps and distillation.warmup_steps; "
    "optimizer.skip_nonfinite sets how many such steps in a row are left out"
)


@dataclass
class Health:
    """What is remembered of steps that went wrong; saved with the run.

    skipped: steps that were not finite and left out; in_a_row: how many of these came last, without a good one since.
    overflows: steps that a loss scaler left out, to lower its scale.
    first: each loss, before weights, when it was first there; of this process's batches.
    exploded: how many steps in a row these losses have been beyond all measure.
    """

    skipped: int = 0
    in_a_row: int = 0
    overflows: int = 0
    first: dict[str, float] = field(default_factory=dict)
    exploded: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)

    def take(self, wrong: str | None) -> None:
        """Count a step: a good one (None), one whose `loss` or `gradient` is not finite, or an `overflow`."""
        if wrong is None:
            self.in_a_row = 0
        elif wrong == "overflow":
            self.overflows += 1
        else:
            self.skipped += 1
            self.in_a_row += 1

    @property
    def left_out(self) -> dict[str, int]:
        """For the log: how many steps were left out so far, by reason; empty where none was."""
        counts = {"nonfinite": self.skipped, "overflow": self.overflows}
        return {reason: count for reason, count in counts.items() if count}

    def look(self, losses: StepLosses, raw: float, steps: int, step: int) -> None:
        """Take in a good step's losses.

        Args:
            raw: the sum of the losses before weights.
            steps: of the whole training; in a short one fewer steps in a row are enough.

        Raises:
            RunError: they have exploded.
        """
        summed = _summed(losses)
        unseen = [name for name in summed if name not in self.first]
        if unseen:  # at the first step, and where a term starts later
            values = torch.stack([summed[name].double() for name in unseen]).tolist()
            self.first |= dict(zip(unseen, values, strict=True))
        usual = max(1.0, sum(self.first[name] for name in summed))
        self.exploded = self.exploded + 1 if raw > EXPLODED * usual else 0
        if self.exploded >= min(EXPLODED_STEPS, max(1, steps // 4)):
            raise RunError(
                f"step {step}: the training has diverged: its losses, before weights, sum to {raw:.4g}, which were "
                f"{usual:.4g} at first ({counted(self.exploded, 'step')} in a row above {EXPLODED:g} times that). "
                "Lower optimizer.lr or optimizer.clip_norm, or lengthen schedule.warmup_steps, and start again"
            )


class BadStepError(RunError):
    """A step that is not finite and ends the training. The message names the step and every value.

    Nothing of the step is done: what trains is as it was before.

    Attributes:
        batches: the step's; losses: of each; gradients: of all.
        arguments: what the step was made with, besides.
    """

    def __init__(
        self,
        step: int,
        what: str,
        lr: float,
        batches: list[Any],
        losses: list[StepLosses],
        gradients: Gradients,
        arguments: dict[str, Any],
    ) -> None:
        self.step, self.batches, self.losses, self.gradients = step, batches, losses, gradients
        self.arguments = {**arguments, "lr": lr}
        values = "; ".join(
            ", ".join(f"{name} {value.item():.4g}" for name, value in of_batch.weighted.items()) for of_batch in losses
        )
        super().__init__(
            f"step {step}: the {what} is not finite ({values}; lr {lr:.4g}, gradient norm {gradients.total.item():.4g})"
        )


def totals(losses: list[StepLosses], gradients: Gradients) -> tuple[list[float], float, float]:
    """A step's numbers, for which the host waits once.

    Returns:
        The total loss of each batch; the losses before weights of the last one, summed; the norm of all gradients.
    """
    weighted = [total(of_batch) for of_batch in losses]
    raw = torch.stack([value.float() for value in _summed(losses[-1]).values()]).sum()
    *sums, raw, norm = torch.stack([*(value.detach() for value in weighted), raw, gradients.total.float()]).tolist()
    return sums, raw, norm


def total(losses: StepLosses) -> Tensor:
    """What is minimised: the weighted losses, summed in float32."""
    return torch.stack([value.float() for value in losses.weighted.values()]).sum()


def what_is_wrong(sums: list[float], norm: float) -> str | None:
    """Which of a step's numbers is not finite; None where all are."""
    if not all(map(math.isfinite, sums)):
        return "loss"
    return None if math.isfinite(norm) else "gradient"


def is_overflow(wrong: str, scaler: torch.amp.GradScaler) -> bool:
    """Whether a loss scaler's scale, not the training, made the gradients overflow."""
    return wrong == "gradient" and scaler.is_enabled() and scaler.get_scale() > LOWEST_SCALE


class Buffers:
    """The buffers of what trains as they were, such as the averages of batch normalisation, which a bad step spoils."""

    @torch.no_grad()
    def __init__(self, distiller: Distiller) -> None:
        trained = [distiller.student, distiller.terms, *([distiller.balance] if distiller.balance is not None else [])]
        # By dtype: torch copies a list in a few launches only where all in it have the same. Clones are one a buffer.
        live: dict[torch.dtype, list[Tensor]] = {}
        for buffer in chain.from_iterable(module.buffers() for module in trained):
            live.setdefault(buffer.dtype, []).append(buffer)
        self.pairs = [(buffers, [torch.empty_like(buffer) for buffer in buffers]) for buffers in live.values()]
        for buffers, kept in self.pairs:
            torch._foreach_copy_(kept, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for buffers, kept in self.pairs:
            torch._foreach_copy_(buffers, kept)


@torch.no_grad()
def broken(distiller: Distiller) -> list[str]:
    """Names of what trains and holds numbers that are not finite, or beyond all use: parameters and buffers."""
    numbers = {
        name: value
        for name, value in chain(distiller.named_parameters(), distiller.named_buffers())
        if not name.startswith("teacher.") and value.is_floating_point() and value.numel()
    }
    # A sum is not finite where one of its numbers is not. The host waits once for all of them.
    finite = torch.stack([value.sum().float() for value in numbers.values()]).isfinite().tolist()
    return [name.removeprefix("student.model.") for name, good in zip(numbers, finite, strict=True) if not good]


def refuse_broken(distiller: Distiller, step: int) -> None:
    """Make sure that what trains is finite, so that no broken state is scored, or saved over a good one.

    Raises:
        RunError: it is not; names what is broken.
    """
    if names := broken(distiller):
        others = f", and {len(names) - 1} more" if names[1:] else ""
        raise RunError(
            f"step {step}: the training is broken: {names[0]} holds numbers that are not finite{others}. Lower "
            "optimizer.lr or optimizer.clip_norm, and start again; what was saved before is left as it is"
        )


def _summed(losses: StepLosses) -> dict[str, Tensor]:
    """Each loss before weights, once: those at one level are in their mean already."""
    return {name: value for name, value in losses.raw.items() if "/" not in name}
