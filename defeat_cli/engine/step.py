"""One optimizer step on the batches of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from defeat_cli.distillation.distiller import StepLosses
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.transfer import to_device
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
) -> StepLosses:
    """One optimizer step on one or more batches, whose gradients are averaged.

    Args:
        strength, measure: of the distillation terms; see `Distiller.forward`.

    Returns:
        The losses of the last batch.

    Raises:
        RunError: a loss is not finite; names the step and every loss's value. The student is left as it was.
    """
    optimizer, scaler = training.optimizer, training.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr
    device = next(training.distiller.parameters()).device
    for part, (images, targets, _) in enumerate(batches):
        seed_step(seed, training.step, part)
        images = to_device(images, device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            losses = training.distiller(images, targets, strength, measure=measure and part == len(batches) - 1)
        total = torch.stack([value.float() for value in losses.weighted.values()]).sum()
        scaler.scale(total / len(batches)).backward()
        # Asked only after backward is queued: on a GPU the host waits here while the device works.
        if not math.isfinite(total.item()):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.weighted.items())
            raise RunError(
                f"step {training.step}: the loss is not finite ({values}). Lower optimizer.lr or optimizer.clip_norm, "
                "or lengthen schedule.warmup_steps and distillation.warmup_steps"
            )
    if clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if training.ema is not None:
        training.ema.update_parameters(training.distiller.student)
    training.step += 1
    return losses
