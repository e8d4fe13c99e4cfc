"""The losses that DeFeat is compared with: pure functions on tensors, one published formula each.

They are the published sums and means; `losses` has the rules that hold for all. Where a sum grows with the map, the
term in `terms/` converts its weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from defeat_cli.distillation.reduction import as_weights, in_full_precision, require_same, weighted_mean


def pkd_loss(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Half the mean squared difference of standardised features, one level (PKD, arXiv 2207.02039).

        loss = 1/2 mean((z(student) - z(teacher))^2),  z(x) = (x - mean) / (std + 1e-6)

    with the `moments` of each channel. z is 0 on a constant channel and on a single cell.

    Args:
        student: [N, C, h', w'] features; resized to the teacher's cells (bilinear) where those are others.
        teacher: [N, C, h, w] features.
        valid: [N, h, w] bool; cells that are False count for nothing. None takes all.

    Returns:
        The loss, a scalar of at least 0.

    Raises:
        ValueError: shapes that do not go together.
    """
    student, teacher = in_full_precision(student, teacher)
    if student.shape[-2:] != teacher.shape[-2:]:
        student = F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)
    require_same("cells", student, teacher, valid=valid)
    error = (standardized(student, valid) - standardized(teacher, valid)).square().mean(dim=1)
    return weighted_mean(error, as_weights(student, valid)) / 2


def moments(features: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each channel over all cells of a batch.

    Args:
        features: [N, C, h, w].
        valid: [N, h, w] bool; cells that are False are left out. None takes all.

    Returns:
        [1, C, 1, 1] each. A single cell deviates by 0, whose slope counts as 0, as on a constant channel.
    """
    cells = as_weights(features, valid)[:, None]
    number = cells.sum()
    mean = (features * cells).sum(dim=(0, 2, 3), keepdim=True) / number.clamp(min=1)
    length = torch.linalg.vector_norm((features - mean) * cells, dim=(0, 2, 3), keepdim=True)
    return mean, length / (number - 1).clamp(min=1).sqrt()


def standardized(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """(x - mean) / (std + 1e-6) by the `moments` of each channel: [N, C, h, w], [N, h, w] bool -> [N, C, h, w]."""
    mean, std = moments(features, valid)
    return (features - mean) / (std + 1e-6)


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Channel-wise distillation of one level: where each channel looks (CWD, arXiv 2011.13256).

        loss = T^2 / (N C) sum over images and channels of KL(softmax(teacher / T) || softmax(student / T))

    with each softmax over the cells of one channel.

    Args:
        student, teacher: [N, C, h, w] features.
        temperature: T, above 0.
        valid: [N, h, w] bool; cells that are False are left out of the softmax. None takes all.

    Returns:
        The loss, a scalar of at least 0.

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("cells", student, teacher, valid=valid)
    student, teacher = in_full_precision(student, teacher)
    cells = as_weights(student, valid).flatten(1)[:, None]
    log_student, log_teacher = (
        _log_softmax_over(features.flatten(2) / temperature, cells) for features in (student, teacher)
    )
    divergence = (log_teacher.exp() * (log_teacher - log_student) * cells).sum()
    return temperature**2 * divergence / (student.shape[0] * student.shape[1])


def attention(features: Tensor, temperature: float, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where and in which channels features are large (FGD, arXiv 2111.11837).

        spatial = cells softmax over cells of (mean over channels of |x|) / T
        channel = C softmax over channels of (mean over cells of |x|) / T

    Args:
        features: [N, C, h, w].
        temperature: T, above 0.
        valid: [N, h, w] bool; cells that are False are not there. None takes all.

    Returns:
        spatial [N, h, w], whose mean over the valid cells is 1, and channel [N, C], whose mean is 1. At least float32.
    """
    magnitude = features.to(torch.promote_types(features.dtype, torch.float32)).abs()
    cells = as_weights(magnitude, valid)
    number = cells.sum(dim=(1, 2))
    logits = magnitude.mean(dim=1) / temperature
    spatial = _log_softmax_over(logits.flatten(1), cells.flatten(1)).exp().view_as(cells)
    of_channels = (magnitude * cells[:, None]).sum(dim=(2, 3)) / number.clamp(min=1)[:, None]
    channel = magnitude.shape[1] * F.softmax(of_channels / temperature, dim=1)
    return number[:, None, None] * spatial * cells, channel


def fgd_focal(
    student: Tensor, teacher: Tensor, fg: Tensor, bg: Tensor, temperature: float = 0.5, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Focal distillation of one level: the teacher's attention weighs each squared difference (FGD).

        fg loss = 1/N sum of fg spatial channel (student - teacher)^2,  bg loss likewise

    with `attention` of the teacher. A sum over channels; over cells it is what the masks make of it.

    Args:
        student, teacher: [N, C, h, w] features.
        fg, bg: [N, h, w] weights of the cells, at least 0, as `masks.focal_masks` gives them.
        temperature: that of the attention, above 0.
        valid: [N, h, w] bool, the cells that attention is spread over. None takes all.

    Returns:
        The foreground and background sums over N, unweighted scalars.

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("cells", student, teacher, fg=fg, bg=bg, valid=valid)
    student, teacher = in_full_precision(student, teacher)
    spatial, channel = attention(teacher, temperature, valid)
    error = spatial * ((student - teacher).square() * channel[:, :, None, None]).sum(dim=1)
    images = student.shape[0]
    return (error * fg.to(error.dtype)).sum() / images, (error * bg.to(error.dtype)).sum() / images


def fgd_attention_loss(
    student: Tensor, teacher: Tensor, temperature: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """Distance of the student's attention from the teacher's on one level, a scalar (FGD).

        loss = 1/N sum |channel_s - channel_t| + 1/N sum |spatial_s - spatial_t|

    Args:
        student, teacher, temperature, valid: as in `fgd_focal`.
    """
    return sum(fgd_attention_parts(student, teacher, temperature, valid))


def fgd_attention_parts(
    student: Tensor, teacher: Tensor, temperature: float = 0.5, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two sums of `fgd_attention_loss`: over cells, which grows with h w, and over channels, which grows with C."""
    require_same("cells", student, teacher, valid=valid)
    student, teacher = in_full_precision(student, teacher)
    maps = zip(attention(student, temperature, valid), attention(teacher, temperature, valid), strict=True)
    spatial, channel = ((of_student - of_teacher).abs().sum() / student.shape[0] for of_student, of_teacher in maps)
    return spatial, channel


def mgd_loss(generated: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Squared error of features that were generated from a masked student, 1/N sum (generated - teacher)^2, one level.

    MGD, arXiv 2205.01529. A sum over channels and cells. FGD's relation loss is the same sum.

    Args:
        generated, teacher: [N, C, h, w].
        valid: [N, h, w] bool; cells that are False count for nothing. None takes all.

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("cells", generated, teacher, valid=valid)
    generated, teacher = in_full_precision(generated, teacher)
    error = (generated - teacher).square().sum(dim=1)
    return (error * as_weights(error[:, None], valid)).sum() / generated.shape[0]


def frs_loss(student: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """Imitation where the teacher is sure of an object, one level (feature-richness score, arXiv 2111.00674).

        loss = sum of m (student - teacher)^2 / sum of m,  squares summed over channels

    Args:
        student: [N, C, h, w] features, already adapted to the teacher's channels.
        teacher: [N, C, h, w] features.
        score: m, [N, h, w] in [0, 1]; 0 on cells that count for nothing.

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("cells", student, teacher, score=score)
    student, teacher = in_full_precision(student, teacher)
    return weighted_mean((student - teacher).square().sum(dim=1), score.detach().to(student.dtype))


def frs_class_loss(student_logits: Tensor, teacher_logits: Tensor, score: Tensor) -> Tensor:
    """Class scores where the teacher is sure of an object, one level: sum of m BCE(student, teacher) / sum of m.

    Args:
        student_logits, teacher_logits: [N, A, h, w] sigmoid logits; the cross-entropies of a cell are summed over A.
        score: m, as in `frs_loss`.

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("cells", student_logits, teacher_logits, score=score)
    student, teacher = in_full_precision(student_logits, teacher_logits)
    entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").sum(dim=1)
    return weighted_mean(entropy, score.detach().to(student.dtype))


def dist_loss(
    student_probabilities: Tensor, teacher_probabilities: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How far class probabilities are from being linear in the teacher's (DIST, arXiv 2205.10536).

        rows = 1 - mean over regions of r,  columns = 1 - mean over classes of r

    with r Pearson's correlation of a row (the classes of one region) or a column (the regions of one class); r is 0
    where either side is constant.

    Args:
        student_probabilities, teacher_probabilities: [R, K] of the same regions and classes.
        valid: [R] bool; regions that are False are left out. None takes all.

    Returns:
        rows and columns, unweighted scalars in [0, 2].

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("regions", student_probabilities, teacher_probabilities, valid=valid)
    student, teacher = in_full_precision(student_probabilities, teacher_probabilities)
    regions = as_weights(student, valid)
    in_rows = weighted_mean(1 - _correlation(student, teacher, torch.ones_like(student)), regions)
    # Columns of no region have no correlation to be blamed for.
    in_columns = 1 - _correlation(student.T, teacher.T, regions.expand_as(student.T))
    return in_rows, in_columns.mean() * (regions.sum() > 0)


def crosskd_class(
    cross_logits: Tensor, teacher_logits: Tensor, weights: Tensor, positives: Tensor | float, beta: float = 1.0
) -> Tensor:
    """Cross-head distillation of classes (CrossKD, arXiv 2306.11369).

        loss = sum of weights BCE(sigmoid(x), sigmoid(t)) |sigmoid(x) - sigmoid(t)|^beta / positives

    Args:
        cross_logits: x, [R, K], what the last layers of the teacher's head make of the student's features.
        teacher_logits: t, [R, K].
        weights: [R], at least 0.
        positives: number of positive anchors or points in the batch; 0 divides by 1.
        beta: at least 1.

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("regions", cross_logits, teacher_logits, weights=weights)
    cross, teacher = in_full_precision(cross_logits, teacher_logits)
    target = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(cross, target, reduction="none")
    focused = (entropy * (cross.sigmoid() - target).abs() ** beta).sum(dim=1)
    return (focused * weights.detach().to(focused.dtype)).sum() / (positives + (positives == 0))


def crosskd_box(cross_boxes: Tensor, teacher_boxes: Tensor, weights: Tensor, positives: Tensor | float) -> Tensor:
    """Cross-head distillation of boxes: sum of weights (1 - GIoU) / positives (CrossKD, arXiv 2306.11369).

    Args:
        cross_boxes, teacher_boxes: [R, 4] xyxy pixels, decoded from what the teacher's last layers say of the student's
            and of its own features.
        weights: [R], at least 0: the teacher's best class probability of each.
        positives: as in `crosskd_class`.

    Raises:
        ValueError: shapes that do not go together.
    """
    require_same("regions", cross_boxes, teacher_boxes, weights=weights)
    cross, teacher = in_full_precision(cross_boxes, teacher_boxes)
    distance = 1 - _generalized_iou(cross, teacher)
    return (distance * weights.detach().to(distance.dtype)).sum() / (positives + (positives == 0))


def _log_softmax_over(logits: Tensor, cells: Tensor) -> Tensor:
    """Log-softmax over the last dimension where `cells` is 1; a large negative number where it is 0."""
    return F.log_softmax(logits.masked_fill(cells == 0, torch.finfo(logits.dtype).min / 2), dim=-1)


def _correlation(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Pearson's correlation of each row over its entries of weight 1, the rest having 0: [R, K] -> [R]."""
    number = weights.sum(dim=1, keepdim=True).clamp(min=1)
    student, teacher = (
        (row - (row * weights).sum(dim=1, keepdim=True) / number) * weights for row in (student, teacher)
    )
    lengths = student.norm(dim=1) * teacher.norm(dim=1)
    return (student * teacher).sum(dim=1) / (lengths + 1e-8)


def _generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU of each pair of boxes, in [-1, 1], 0 parts for 0 areas: [R, 4] xyxy each -> [R]."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        sides = (high - low).clamp(min=0)
        return sides[:, 0] * sides[:, 1]

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return part / torch.where(whole > 0, whole, 1)

    (low, high), (other_low, other_high) = boxes.split(2, dim=1), others.split(2, dim=1)
    common = area(torch.maximum(low, other_low), torch.minimum(high, other_high))
    union = area(low, high) + area(other_low, other_high) - common
    hull = area(torch.minimum(low, other_low), torch.maximum(high, other_high))
    return ratio(common, union) - ratio(hull - union, hull)
