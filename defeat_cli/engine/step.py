"""One optimizer step on the batches of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from defeat_cli.distillation.distiller import StepLosses
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.faults import BadStepError, Buffers, is_overflow, total, totals, what_is_wrong
from defeat_cli.engine.gradients import Gradients, gradients_of
from defeat_cli.engine.transfer import to_device

TrainingBatch = tuple[list[Tensor], list[dict[str, Tensor] | None], list[int]]
"""Images, targets (None for unlabelled images) and image ids."""


@dataclass(frozen=True)
class Step:
    """What a step was: the losses of its last batch, those before weights summed, and the gradients of all batches.

    left_out: why the student was not changed by it, `loss`, `gradient` or `overflow`; None where it was.
    """

    losses: StepLosses
    raw: float
    gradients: Gradients
    left_out: str | None = None


def seed_step(seed: int, step: int, part: int = 0) -> None:
    """Make randomness depend on (seed, step, which of the step's batches) alone.

    So resuming needs no generator state, and what the teacher draws for one batch changes nothing in the next.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + part)


def train_step(
    training: Training,
    batches: list[TrainingBatch],
    *,
    seed: int,
    lr: float,
    strength: float | Mapping[str, float | None],
    clip_norm: float | None,
    autocast: torch.dtype | None,
    measure: bool = False,
    skip_nonfinite: int = 0,
) -> Step:
    """One optimizer step on one or more batches, whose gradients are averaged.

    Args:
        strength, measure: of the distillation terms; see `Distiller.forward`.
        skip_nonfinite: so many steps in a row that are not finite are left out; the next one raises.

    Raises:
        BadStepError: a loss or gradient is not finite. All that trains is left as it was.
    """
    optimizer, scaler, health = training.optimizer, training.scaler, training.health
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = Buffers(training.distiller)
    arguments = {"seed": seed, "strength": strength, "measure": measure}
    try:
        losses, gradients = backward(training, batches, **arguments, autocast=autocast)
        # Asked only after backward is queued: on a GPU the host waits here, once a step, while the device works.
        sums, raw, norm = totals(losses, gradients)
        wrong = what_is_wrong(sums, norm)
        if wrong is not None and is_overflow(wrong, scaler):
            wrong = "overflow"
        if wrong in ("loss", "gradient") and health.in_a_row >= skip_nonfinite:
            raise BadStepError(training.step, wrong, lr, batches, losses, gradients, arguments)
    except BaseException:
        before.restore()
        optimizer.zero_grad(set_to_none=True)
        raise
    health.take(wrong)
    if wrong is None:
        if clip_norm is not None:
            gradients.clip(clip_norm)
        scaler.step(optimizer)
        if training.ema is not None:
            training.ema.update_parameters(training.distiller.student)
    else:
        before.restore()
    scaler.update()  # it lowers its scale where the gradients overflowed
    optimizer.zero_grad(set_to_none=True)
    training.step += 1
    return Step(losses[-1], raw, gradients, wrong)


def backward(
    training: Training,
    batches: list[TrainingBatch],
    *,
    seed: int,
    strength: float | Mapping[str, float | None],
    measure: bool,
    autocast: torch.dtype | None,
) -> tuple[list[StepLosses], Gradients]:
    """The losses of each batch, and the gradients of their mean, which are left in the parameters."""
    device = next(training.distiller.parameters()).device
    losses = []
    for part, (images, targets, _) in enumerate(batches):
        seed_step(seed, training.step, part)
        images = to_device(images, device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            found = training.distiller(images, targets, strength, measure=measure and part == len(batches) - 1)
        training.scaler.scale(total(found) / len(batches)).backward()
        losses.append(found)
    training.scaler.unscale_(training.optimizer)
    return losses, gradients_of(training.optimizer)
