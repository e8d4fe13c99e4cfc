"""One optimizer step on the batches of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defeat_cli.data.sharing import Part, Share
from defeat_cli.distillation.distiller import StepLosses
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.faults import BadStepError, Buffers, is_overflow, total, totals, what_is_wrong
from defeat_cli.engine.gradients import Gradients, gradients_of
from defeat_cli.engine.transfer import to_device
from defeat_cli.engine.watch import COMPUTED
from defeat_cli.errors import Ended

TrainingBatch = tuple[list[Tensor], list[dict[str, Tensor] | None], list[int]]
"""Images, targets (None for unlabelled images) and image ids."""


@dataclass(frozen=True)
class Step:
    """What a step was: the losses of each batch, those of the last before weights summed, and the gradients of all.

    losses: of this process's batches that count; gradients are those of all processes.
    left_out: why the student was not changed by it, `loss`, `gradient` or `overflow`; None where it was.
    """

    losses: list[StepLosses]
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
    share: Share | None = None,
    world: World = ALONE,
) -> Step:
    """One optimizer step on one or more batches, whose gradients are averaged; together with the other processes.

    Args:
        strength, measure: of the distillation terms; see `Distiller.forward`. Pulls are measured on the last batch.
        skip_nonfinite: so many steps in a row that are not finite are left out; the next one raises.
        share: what the batches are of the step's; None where they are all of it.

    Raises:
        BadStepError: a loss or gradient is not finite. All that trains is left as it was.
        Ended: the same, in another process.
    """
    optimizer, scaler, health = training.optimizer, training.scaler, training.health
    share = share or whole(len(batches))
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = Buffers(training.distiller)
    arguments = {"seed": seed, "strength": strength, "measure": measure}
    try:
        losses, gradients = backward(training, batches, **arguments, autocast=autocast, share=share, world=world)
        # Asked only after backward is queued: on a GPU the host waits here, once a step, while the device works.
        sums, raw, norm = totals(losses, gradients)
        wrong, culprit = agreed(what_is_wrong(sums, norm), world)
        if wrong is not None and is_overflow(wrong, scaler):
            wrong = "overflow"
        if wrong in ("loss", "gradient") and health.in_a_row >= skip_nonfinite:
            if culprit != world.rank:
                raise Ended
            arguments["parts"] = [part.number for part in share.parts]
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
        # What was measured here: on batches that count, and pulls on the last of them.
        world.average(running_statistics(training.distiller.student), weight=float(share.counts))
        if measure and training.distiller.balance is not None:
            world.take(list(training.distiller.balance.buffers()), owner=share.has_last)
        if training.ema is not None:
            training.ema.update_parameters(training.distiller.student)
    else:
        before.restore()
    scaler.update()  # it lowers its scale where the gradients overflowed
    optimizer.zero_grad(set_to_none=True)
    training.step += 1
    return Step(losses if share.counts else [], raw, gradients, wrong)


def backward(
    training: Training,
    batches: list[TrainingBatch],
    *,
    seed: int,
    strength: float | Mapping[str, float | None],
    measure: bool,
    autocast: torch.dtype | None,
    share: Share,
    world: World = ALONE,
) -> tuple[list[StepLosses], Gradients]:
    """The losses of each batch, and the gradients of the mean over all processes', which are left in the parameters."""
    device = next(training.distiller.parameters()).device
    losses = []
    for part, (images, targets, _) in zip(share.parts, batches, strict=True):
        last = part is share.parts[-1]
        seed_step(seed, training.step, part.number)
        images = to_device(images, device)
        with world.keeping_gradients(training.parallel, not last):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                found = training.parallel(images, targets, strength, measure=measure and last and share.has_last)
            world.watch.at(COMPUTED)
            # Averaged over the processes later, where the sum is meant.
            training.scaler.scale(total(found) / (part.divisor / world.size)).backward()
        losses.append(found)
    training.scaler.unscale_(training.optimizer)
    return losses, gradients_of(training.optimizer)


def agreed(wrong: str | None, world: World) -> tuple[str | None, int]:
    """What is wrong with a step in the eyes of all processes, a loss before a gradient, and the first that finds so."""
    reasons = (None, "gradient", "loss")
    (worst,) = world.most(reasons.index(wrong) * world.size + world.size - 1 - world.rank)
    return reasons[worst // world.size], world.size - 1 - worst % world.size


def whole(batches: int, numbers: Sequence[int] = ()) -> Share:
    """The share of a process alone: all batches of a step.

    Args:
        numbers: their places among its parts, where these are not simply in order.
    """
    return Share([Part(number, batches, []) for number in numbers or range(batches)], batches)


def running_statistics(student: nn.Module) -> list[Tensor]:
    """Means and variances that batch normalisation follows, which differ between processes after a step."""
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False) if buffer.is_floating_point()]
