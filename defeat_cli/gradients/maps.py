"""How strongly a loss pulls on each cell of the neck's features: what DeFeat starts from (its figure 1).

The pull on a cell is the size of the loss's gradient with respect to that cell's features. Every FPN level counts as an
input of its own, as it does in distillation: what P6 passes back to the P5 that it was pooled from is not part of P5's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from defeat_cli.detectors.contract import Batch, Detector
from defeat_cli.distillation.adapters import Adapter
from defeat_cli.distillation.losses import imitation_loss
from defeat_cli.distillation.masks import box_masks, valid_masks
from defeat_cli.distillation.pairing import match_levels
from defeat_cli.errors import CheckpointError, DefeatError

Reduce = Literal["l2", "mean-abs"]

LOSSES = {
    "rpn": ("loss_objectness", "loss_rpn_box_reg"),
    "classification": ("loss_classifier", "classification"),
    "regression": ("loss_box_reg", "bbox_regression", "bbox_ctrness"),
}
"""Parts of the detection loss, by torchvision's names in Faster R-CNN, RetinaNet and FCOS; they add up to the whole."""

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda gradient: gradient.norm(dim=1),
    "mean-abs": lambda gradient: gradient.abs().mean(dim=1),
}
"""[N, C, h, w] gradients to [N, h, w] magnitudes."""

NECK_VARIANTS = {
    "full": (False, True, False),
    "fg-only": (True, True, False),
    "bg-only": (True, False, True),
    "neck": (True, True, True),
}
"""Variants of the neck term (design 1.5): is it decoupled by boxes, has it a foreground and has it a background group.
Where it is not decoupled, every cell is foreground."""


def gradient_maps(
    detector: Detector,
    batch: Batch,
    loss: str = "total",
    samples: int = 8,
    seed: int = 0,
    reduce: Reduce = "l2",
) -> list[Tensor]:
    """Magnitude of the detection loss's gradient with respect to each FPN level.

    Two-stage detectors draw the anchors and proposals that they are trained on. Magnitudes, not gradients, are averaged
    over the draws: that is the pull of an average training step, and more draws make it steadier without making it
    smaller. The loss is that of training, with every normalization in eval mode; no weight, buffer or mode is changed.

    Args:
        batch: one image with its target.
        loss: `total`, or a part of it, a key of `LOSSES`.
        samples: draws; detectors that draw nothing are asked once.
        seed: fixes the draws. The global random state is left as it was.
        reduce: L2 norm or mean absolute value over channels.

    Returns:
        One [h, w] map a level, finest first.

    Raises:
        DefeatError: the detector has no such loss.
    """
    if not hasattr(detector.model, "rpn"):
        samples = 1
    with losses_in_eval_mode(detector):
        features = _as_leaves(detector, batch)
        return _mean_magnitudes(
            lambda: part_of(detector.losses(features, batch), loss), features, samples, seed, reduce
        )


def part_of(losses: Mapping[str, Tensor], part: str) -> Tensor:
    """The sum of the named losses that a part of the detection loss consists of.

    Raises:
        DefeatError: none of them is there.
    """
    if part == "total":
        return sum(losses.values())
    chosen = [value for name, value in losses.items() if name in LOSSES.get(part, ())]
    if not chosen:
        has = [name for name, terms in LOSSES.items() if any(term in losses for term in terms)]
        raise DefeatError(f"--loss {part}: this detector has no such loss; it has total, {', '.join(has)}")
    return sum(chosen)


def distillation_maps(
    student: Detector,
    teacher: Detector,
    adapters: Sequence[nn.Module],
    batch: Batch,
    *,
    alpha_fg: float = 4.0,
    alpha_bg: float = 16.0,
    finest_scale: float = 56.0,
    reduce: Reduce = "l2",
) -> dict[str, list[Tensor]]:
    """Magnitude of the neck distillation term's gradient with respect to each of the student's FPN levels.

    Args:
        adapters: one for each pair of levels that student and teacher share, finest first; see `neck_adapters`.
        batch: one image with its target.

    Returns:
        Variant of the neck term -> one [h, w] map a level; zeros on a level that the teacher has not.
    """
    with losses_in_eval_mode(student), losses_in_eval_mode(teacher):
        features = _as_leaves(student, batch)
        teacher_features = _as_leaves(teacher, batch)
    shapes = [tuple(feature.shape[-2:]) for feature in features]
    valid = valid_masks(batch.valid, shapes)
    inside = box_masks([target["boxes"] for target in batch.targets], shapes, student.strides, finest_scale)
    pairs = match_levels(student.strides, teacher.strides)

    def term(decoupled: bool, foreground: bool, background: bool) -> Tensor:
        losses = []
        for (s, t), adapter in zip(pairs, adapters, strict=True):
            mask = inside[s] if decoupled else torch.ones_like(inside[s])
            alphas = alpha_fg * foreground, alpha_bg * background
            losses.append(sum(imitation_loss(adapter(features[s]), teacher_features[t], mask, *alphas, valid=valid[s])))
        return torch.stack(losses).mean()

    return {
        variant: _mean_magnitudes(partial(term, *groups), features, samples=1, seed=0, reduce=reduce)
        for variant, groups in NECK_VARIANTS.items()
    }


def neck_adapters(
    student: Detector, teacher: Detector, trained: Mapping[str, Tensor] | None, checkpoint: str
) -> nn.ModuleList:
    """The neck's adapters between two detectors, as training left them; none are needed where channels agree.

    Args:
        trained: their state dict, from a checkpoint of a distilled run; None or empty where there is none.
        checkpoint: what a message calls it.

    Raises:
        CheckpointError: the detectors share no level, the adapters are between other detectors, or there are none and
            channels differ.
    """
    pairs = match_levels(student.strides, teacher.strides)
    inner, outer = [student.levels[s].channels for s, _ in pairs], [teacher.levels[t].channels for _, t in pairs]
    if not pairs:
        raise CheckpointError(
            f"no level of the teacher ({teacher.strides}) has a stride of the student's {student.strides}"
        )
    if trained:
        adapters = nn.ModuleList(Adapter(i, o) for i, o in zip(inner, outer, strict=True))
        try:
            adapters.load_state_dict(trained)
        except RuntimeError:
            raise CheckpointError(
                f"{checkpoint}: its adapters were trained with another teacher than this one"
            ) from None
    elif inner == outer:
        adapters = nn.ModuleList(nn.Identity() for _ in pairs)
    else:
        raise CheckpointError(
            f"{checkpoint}: holds no adapters from the student's {inner} channels to the teacher's {outer}; "
            "give best.pt or last.pt of a run that was distilled from this teacher"
        )
    return adapters.eval().to(next(student.parameters()).device)


@contextmanager
def losses_in_eval_mode(detector: Detector) -> Iterator[None]:
    """Everything in eval mode, so that no normalization statistics move, but for the parts that compute losses.

    torchvision's model, RPN and RoI heads choose between losses and detections by their own `training`; what they are
    made of stays in eval mode. All modes are as they were afterwards.
    """
    model = detector.model
    modes = {module: module.training for module in detector.modules()}
    detector.eval()
    for part in (model, getattr(model, "rpn", None), getattr(model, "roi_heads", None)):
        if part is not None:
            part.training = True
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _as_leaves(detector: Detector, batch: Batch) -> list[Tensor]:
    """FPN features, computed once and cut loose from the backbone, which keeps no activations."""
    with torch.no_grad():
        features = detector.features(batch)
    return [feature.detach().requires_grad_() for feature in features]


def _mean_magnitudes(
    loss: Callable[[], Tensor], features: list[Tensor], samples: int, seed: int, reduce: Reduce
) -> list[Tensor]:
    """Mean over seeded draws of the loss of its gradients' magnitudes, one [h, w] a level."""
    totals = [feature.new_zeros(feature.shape[-2:]) for feature in features]
    device = features[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in range(samples):
            value = loss()
            if not value.requires_grad:
                continue
            gradients = torch.autograd.grad(value, features, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total += REDUCTIONS[reduce](gradient)[0] / samples
    return totals
