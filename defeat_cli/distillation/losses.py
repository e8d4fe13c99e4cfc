"""The distillation losses: pure functions on tensors (DeFeat, section 3).

All compute in float32 at least, whatever autocast says; the teacher's side gets no gradient; a group that nothing
belongs to gives an exact 0 that the student is still connected to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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
    cells = (len(student), *student.shape[2:])
    if student.shape != teacher.shape or mask.shape != cells or (valid is not None and valid.shape != cells):
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, mask {tuple(mask.shape)}"
            + (f" and valid {tuple(valid.shape)}" if valid is not None else "")
            + " do not describe the same cells"
        )
    student, teacher = _in_full_precision(student, teacher)
    foreground = mask.to(student.dtype)
    background = 1 - foreground
    if valid is not None:
        foreground, background = foreground * valid, background * valid
    error = (student - teacher).square().sum(dim=1)
    twice_channels = 2 * student.shape[1]
    return (
        alpha_fg / twice_channels * _mean(error, foreground),
        alpha_bg / twice_channels * _mean(error, background),
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
    regions = student.shape[:1]
    if student.shape != teacher.shape or foreground.shape != regions or (valid is not None and valid.shape != regions):
        raise ValueError(
            f"student logits {tuple(student.shape)}, teacher logits {tuple(teacher.shape)}, foreground "
            f"{tuple(foreground.shape)}"
            + (f" and valid {tuple(valid.shape)}" if valid is not None else "")
            + " do not describe the same regions"
        )
    student, teacher = _in_full_precision(student, teacher)
    background = ~foreground
    if valid is not None:
        foreground, background = foreground & valid, background & valid

    def at(temperature: float) -> Tensor:
        return temperature**2 * divergence(student / temperature, teacher / temperature)

    kl_fg = at(temperature_fg)
    kl_bg = kl_fg if temperature_bg == temperature_fg else at(temperature_bg)
    return (
        beta_fg * _mean(kl_fg, foreground.to(student.dtype)),
        beta_bg * _mean(kl_bg, background.to(student.dtype)),
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


def _in_full_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, float32 at least, the teacher without gradient."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over all elements; where the weights sum to 0, an exact 0 connected to the values."""
    total = weights.sum()
    return (weights * values).sum() / torch.where(total > 0, total, 1)
