"""The losses that `--distillation` shows side by side: the neck term, its halves and its undivided form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from defeat_cli.detectors.contract import Batch, Detector
from defeat_cli.distillation.adapters import build_adapters
from defeat_cli.distillation.losses import imitation_loss
from defeat_cli.distillation.masks import MASKS, valid_masks
from defeat_cli.distillation.pairing import match_levels
from defeat_cli.errors import CheckpointError
from defeat_cli.gradients.maps import NeckLoss, neck_features

Panels = Callable[[Batch], dict[str, NeckLoss]]
"""From a batch of one image to named losses on the student's neck; each becomes a row of the picture."""

NECK_VARIANTS = {
    "full": ("full", True, False),
    "fg-only": ("boxes", True, False),
    "bg-only": ("boxes", False, True),
    "neck": ("boxes", True, True),
}
"""Variants of the neck term (design 1.5): the mask's kind, and whether foreground and background are in it."""


def neck_panels(
    student: Detector,
    teacher: Detector,
    adapters: Sequence[nn.Module],
    *,
    alpha_fg: float,
    alpha_bg: float,
    finest_scale: float,
) -> Panels:
    """The neck term's variants (design 1.1) as losses on the student's features.

    Args:
        adapters: one for each pair of levels that student and teacher share, finest first; see `neck_adapters`.
        alpha_fg, alpha_bg: weights of foreground and background cells.
        finest_scale: object side in pixels that the first level begins at.
    """
    pairs = match_levels(student.strides, teacher.strides)

    def panels(batch: Batch) -> dict[str, NeckLoss]:
        supervision = neck_features(teacher, batch)
        boxes = [target["boxes"] for target in batch.targets]

        def term(kind: str, foreground: bool, background: bool, features: list[Tensor]) -> Tensor:
            shapes = [tuple(feature.shape[-2:]) for feature in features]
            masks = MASKS[kind](boxes, shapes, student.strides, finest_scale=finest_scale, anchors=None)
            valid = valid_masks(batch.valid, shapes)
            alphas = alpha_fg * foreground, alpha_bg * background
            levels = [
                sum(imitation_loss(adapter(features[s]), supervision[t], masks[s], *alphas, valid=valid[s]))
                for (s, t), adapter in zip(pairs, adapters, strict=True)
            ]
            return torch.stack(levels).mean()

        return {name: partial(term, *variant) for name, variant in NECK_VARIANTS.items()}

    return panels


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
        adapters = build_adapters(inner, outer)
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
