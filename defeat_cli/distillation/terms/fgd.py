"""FGD: focal distillation by masks and attention, global distillation by relations (arXiv 2111.11837)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from defeat_cli.config.terms import FgdSettings
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.losses import fgd_attention_parts, fgd_focal, mgd_loss
from defeat_cli.distillation.masks import focal_masks, valid_masks
from defeat_cli.distillation.terms.base import Loss, View
from defeat_cli.distillation.terms.pyramid import PyramidTerm, at_published_size, summed


class Relation(nn.Module):
    """Adds to every cell what an attention over all cells gathers: x + W2 relu(LN(W1 ctx)).

    ctx = sum over cells of x softmax over cells of (context x): [N, C]. W1 halves the channels, W2 brings them back and
    starts at 0, so that the module starts as the identity. Both are 1x1 convolutions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.context = nn.Conv2d(channels, 1, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, kernel_size=1),
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """[N, C, h, w], [N, h, w] bool -> [N, C, h, w]; nothing is gathered from cells that are not valid."""
        logits = self.context(features)[:, 0]
        if valid is not None:
            logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
        shares = logits.flatten(1).softmax(dim=1)
        gathered = torch.einsum("ncp,np->nc", features.flatten(2), shares)
        return features + self.transform(gathered[:, :, None, None])


class Fgd(PyramidTerm):
    """Four losses, each the sum over levels: focal on foreground and on background, of attention, of relations.

    All are given as they would be at the published size: the focal ones are sums over channels, which the masks average
    over cells; that of attention is a sum over cells and a sum over channels; that of relations is a sum over both.
    Either side has relation modules of its own, and both are trained.
    """

    Settings = FgdSettings
    left_out = "pooled"

    def __init__(
        self, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(student, teacher, class_map=class_map, **settings)
        # Modules that no loss reaches would only stand in the way of distributed training.
        related = self.pairs if self.settings.relation > 0 else []
        channels = [self.teacher_levels[t].channels for _, t in related]
        self.student_relations = nn.ModuleList(Relation(number) for number in channels)
        self.teacher_relations = nn.ModuleList(Relation(number) for number in channels)

    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        settings = self.settings
        shapes = [tuple(feature.shape[-2:]) for feature in student.features]
        strides = [level.stride for level in self.levels]
        boxes = [target["boxes"] for target in student.targets]
        masks = focal_masks(boxes, shapes, strides, valid_masks(student.batch.valid, shapes, strides))
        values: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for index, level in enumerate(self.compared(student, teacher)):
            ours, theirs, valid = level.student, level.teacher, level.valid
            channels, cells = {"channels": ours.shape[1]}, {"stride": strides[level.index], "valid": valid}
            focal = fgd_focal(ours, theirs, *masks[level.index], settings.temperature, valid)
            for name, value in zip(("fg", "bg"), focal, strict=True):
                values[name][level.name] = at_published_size(value, **channels)
            spatial, channel = fgd_attention_parts(ours, theirs, settings.temperature, valid)
            values["attention"][level.name] = at_published_size(spatial, **cells) + at_published_size(
                channel, **channels
            )
            if self.student_relations:
                with torch.autocast(ours.device.type, enabled=False):
                    # Both sides are trained: their difference goes in whole, where a teacher would get no gradient.
                    apart = self.student_relations[index](ours, valid) - self.teacher_relations[index](theirs, valid)
                total = mgd_loss(apart, torch.zeros_like(apart), valid)
                values["relation"][level.name] = at_published_size(total, **channels, **cells)
        weights = {
            "fg": settings.alpha_fg,
            "bg": settings.alpha_bg,
            "attention": settings.attention,
            "relation": settings.relation,
        }
        return {name: summed(of_levels, weights[name]) for name, of_levels in values.items()}
