"""The distillation losses: pure functions on tensors; DeFeat's (section 3) here, its rivals' from `rival_losses`.

All compute in float32 at least, whatever autocast says; the teacher's side gets no gradient; a group that nothing
belongs to gives an exact 0 that the student is still connected to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from defeat_cli.distillation.reduction import in_full_precision, require_same, weighted_mean
from defeat_cli.distillation.rival_losses import (
    attention,
    crosskd_box,
    crosskd_class,
    cwd_loss,
    dist_loss,
    fgd_attention_loss,
    fgd_attention_parts,
    fgd_focal,
    frs_class_loss,
    frs_loss,
    mgd_loss,
    moments,
    pkd_loss,
)

__all__ = [
    "attention",
    "crosskd_box",
    "crosskd_class",
    "cwd_loss",
    "dist_loss",
    "fgd_attention_loss",
    "fgd_attention_parts",
    "fgd_focal",
    "frs_class_loss",
    "frs_loss",
    "imitation_loss",
    "mgd_loss",
    "moments",
    "pkd_loss",
    "region_kl",
    "region_kl_sigmoid",
]


def imitation_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    alpha_fg: float,
    alpha_bg: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decoupled feature imitation on one level (DeFeat, section 3, at the neck).

        fg = alpha_fg / (2 C sum(M)) sum(M (student - teacher)^2),  bg likewise with alpha_bg and 1 - M

    Args:
        student: [N, C, h, w] features, already adapted to the teacher's channels.
        teacher: [N, C, h, w] features.
        mask: [N, h, w], bool or float in [0, 1]: how much each cell is foreground.
        alpha_fg, alpha_bg: weights, at least 0.
        valid: [N, h, w] bool; cells that are False belong to neither group. None takes all.

    Returns:
        The weighted foreground and background terms, scalars.

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("cells", student, teacher, mask=mask, valid=valid)
    student, teacher = in_full_precision(student, teacher)
    foreground = mask.to(student.dtype)
    background = 1 - foreground
    if valid is not None:
        foreground, background = foreground * valid, background * valid
    error = (student - teacher).square().sum(dim=1)
    twice_channels = 2 * student.shape[1]
    return (
        alpha_fg / twice_channels * weighted_mean(error, foreground),
        alpha_bg / twice_channels * weighted_mean(error, background),
    )


def region_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    foreground: Tensor,
    beta_fg: float = 1,
    beta_bg: float = 1,
    temperature_fg: float = 1,
    temperature_bg: float = 1,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decoupled classification distillation of softmax classifiers (DeFeat, section 3, at the head).

    A region's term is T^2 KL(softmax(teacher / T) || softmax(student / T)); each group's is the mean over its regions.

    Args:
        student_logits, teacher_logits: [R, K] of the same regions and classes.
        foreground: [R] bool, True where the region is matched to an object.
        beta_fg, beta_bg: weights, at least 0.
        temperature_fg, temperature_bg: above 0.
        valid: [R] bool; regions that are False belong to neither group. None takes all.

    Returns:
        The weighted foreground and background terms, scalars.

    Raises:
        ValueError: shapes that do not go together.
    """
    return _decoupled(
        _softmax_kl, student_logits, teacher_logits, foreground, beta_fg, beta_bg, temperature_fg, temperature_bg, valid
    )


def region_kl_sigmoid(
    student_logits: Tensor,
    teacher_logits: Tensor,
    foreground: Tensor,
    beta_fg: float = 1,
    beta_bg: float = 1,
    temperature_fg: float = 1,
    temperature_bg: float = 1,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`region_kl` for sigmoid classifiers: a region's term is T^2 times the sum over classes of the binary KL.

    Regions are all anchors or points of a one-stage detector; `valid` leaves out those that its assigner ignores.
    """
    return _decoupled(
        _sigmoid_kl, student_logits, teacher_logits, foreground, beta_fg, beta_bg, temperature_fg, temperature_bg, valid
    )


def _decoupled(
    divergence: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    beta_fg: float,
    beta_bg: float,
    temperature_fg: float,
    temperature_bg: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weighted means of a divergence of [R, K] logits over foreground and over background regions."""
    require_same("regions", student, teacher, foreground=foreground, valid=valid)
    student, teacher = in_full_precision(student, teacher)
    background = ~foreground
    if valid is not None:
        foreground, background = foreground & valid, background & valid

    def at(temperature: float) -> Tensor:
        return temperature**2 * divergence(student / temperature, teacher / temperature)

    kl_fg = at(temperature_fg)
    kl_bg = kl_fg if temperature_bg == temperature_fg else at(temperature_bg)
    return (
        beta_fg * weighted_mean(kl_fg, foreground.to(student.dtype)),
        beta_bg * weighted_mean(kl_bg, background.to(student.dtype)),
    )


def _softmax_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)): [R, K] logits -> [R]."""
    log_student, log_teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)


def _sigmoid_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over classes of KL(sigmoid(teacher) || sigmoid(student)), two outcomes each: [R, K] logits -> [R]."""
    # Each outcome's log-ratio is taken apart, so that nothing large cancels however sure the classifiers are.
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (yes + no).sum(dim=1)
