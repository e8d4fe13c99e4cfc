"""The optimizer and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from defeat_cli.config.schema import Optimizer, Schedule
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.text import counted


def build_optimizer(optimizer: Optimizer, distiller: Distiller) -> torch.optim.Optimizer:
    """SGD or AdamW over all that trains: the student's parameters that are not frozen, and the terms'."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    norm_parameters = {
        id(parameter)
        for module in distiller.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name == "bias"
    }
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    norm_decay = optimizer.weight_decay if optimizer.norm_weight_decay is None else optimizer.norm_weight_decay
    groups = [
        {"params": [p for p in trained if id(p) not in norm_parameters], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in trained if id(p) in norm_parameters], "weight_decay": norm_decay},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer.name == "sgd":
        # Not fused: torch's fused SGD fails where a parameter has its first gradient in a later step than others.
        return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum)
    # One pass over all parameters, where torch has it: equal to its plain step but for rounding.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=tuple(optimizer.betas), fused=fused)


def lr_factor(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
    decay: str = "steps",
    milestones: Iterable[int] = (),
    gamma: float = 0.1,
) -> float:
    """Share of the base learning rate at a step, counted from 0: linear warm-up, then `steps` or `cosine` decay."""
    warm = 1.0
    if step < warmup_steps:
        warm = warmup_factor + (1 - warmup_factor) * step / warmup_steps
    if decay == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs)))
    return warm * gamma ** sum(step >= milestone * steps_per_epoch for milestone in milestones)


def learning_rate_text(optimizer: Optimizer, schedule: Schedule) -> str:
    """The learning rate over the run in words."""
    parts = [f"learning rate {optimizer.lr:g}"]
    if schedule.warmup_steps:
        parts.append(f"after {counted(schedule.warmup_steps, 'step')} of warm-up")
    if schedule.decay == "cosine":
        parts.append("falling as a cosine")
    else:
        reached = [str(epoch) for epoch in schedule.milestones if epoch < schedule.epochs]
        parts += [f"times {schedule.gamma:g} after epoch {' and '.join(reached)}"] if reached else []
    return ", ".join(parts)
