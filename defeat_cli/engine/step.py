"""One optimizer step on the batches of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from defeat_cli.data.sharing import Part, Share
from defeat_cli.distillation.distiller import StepLosses
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.watch import COMPUTED
from defeat_cli.errors import RunError

TrainingBatch = tuple[list[Tensor], list[dict[str, Tensor] | None], list[int]]
"""Images, targets (None for unlabelled images) and image ids."""


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
    share: Share | None = None,
    world: World = ALONE,
) -> list[StepLosses]:
    """One optimizer step on one or more batches, whose gradients are averaged; together with the other processes.

    Args:
        strength, measure: of the distillation terms; see `Distiller.forward`. Pulls are measured on the last batch.
        share: what the batches are of the step's; None where they are all of it.

    Returns:
        The losses of each batch that counts.

    Raises:
        RunError: a loss is not finite; names the step and every loss's value. The student is left as it was.
    """
    optimizer, scaler, distiller = training.optimizer, training.scaler, training.distiller
    share = share or whole(len(batches))
    for group in optimizer.param_groups:
        group["lr"] = lr
    device = next(distiller.parameters()).device
    counted = []
    for part, (images, targets, _) in zip(share.parts, batches, strict=True):
        seed_step(seed, training.step, part.number)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [t and {key: value.to(device, non_blocking=True) for key, value in t.items()} for t in targets]
        here = measure and share.has_last and part is share.parts[-1]
        # Gradients of all parts but the last stay in this process.
        with world.keeping_gradients(training.parallel, part is not share.parts[-1]):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                losses = training.parallel(images, targets, strength, measure=here)
            total = torch.stack([value.float() for value in losses.weighted.values()]).sum()
            world.watch.at(COMPUTED)
            # Averaged over the processes later, where the sum is meant.
            scaler.scale(total / (part.divisor / world.size)).backward()
        # Asked only after backward is queued: on a GPU the host waits here while the device works.
        if not math.isfinite(total.item()):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.weighted.items())
            raise RunError(
                f"step {training.step}: the loss is not finite ({values}). Lower optimizer.lr or optimizer.clip_norm, "
                "or lengthen schedule.warmup_steps and distillation.warmup_steps"
            )
        if part.counts:
            counted.append(losses)
    if clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    world.average(running_statistics(distiller.student), weight=float(bool(counted)))
    if measure and distiller.balance is not None:
        world.take(list(distiller.balance.buffers()), owner=share.has_last)
    if training.ema is not None:
        training.ema.update_parameters(distiller.student)
    training.step += 1
    return counted


def whole(batches: int) -> Share:
    """The share of a process alone: all batches of a step."""
    return Share([Part(number, batches, []) for number in range(batches)], batches)


def running_statistics(student: nn.Module) -> list[Tensor]:
    """Means and variances that batch normalisation follows, which differ between processes after a step."""
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False) if buffer.is_floating_point()]
