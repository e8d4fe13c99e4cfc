"""One training step's loss terms: the student's detection losses, and what the teacher adds (DeFeat, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from defeat_cli.detectors.contract import Batch, Detector, Regions, Target
from defeat_cli.distillation.adapters import build_adapters
from defeat_cli.distillation.losses import imitation_loss, region_kl, region_kl_sigmoid
from defeat_cli.distillation.masks import MASKS, backbone_masks, valid_masks
from defeat_cli.distillation.pairing import match_levels

BACKBONE_STRIDES = (8, 16, 32)
"""Stages 2-4 of the published code, by what they mean in any backbone."""


@dataclass(frozen=True)
class Terms:
    """Named loss terms of one batch, all scalars.

    weighted: what is summed into the total loss; a term whose weight is 0 is not among them.
    raw: detached values before weight and warm-up, for the log; `neck_fg/P3` is the value at one level.
    """

    weighted: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)


class Distiller(nn.Module):
    """A student, the teacher that supervises it, and the adapters between them.

    `forward` runs both detectors on one batch. The student comes first, and its own sampling with it, so that with
    equal seeds a distilled and a plain student draw the same training samples.

    Args:
        student: the detector that is trained.
        teacher: frozen, in eval mode throughout; None trains the student plainly.
        neck, head, backbone: which places are distilled.
        mask: kind of foreground mask in the neck, a key of `masks.MASKS`.
        finest_scale: object side in pixels that the first level begins at.
        alpha_fg, alpha_bg: weights of foreground and background cells, in neck and backbone.
        decoupled_head: average foreground and background regions apart; else all together, with `beta_fg`.
        beta_fg, beta_bg, temperature_fg, temperature_bg: weights and temperatures of the regions' classification.
        class_pairs: (student, teacher) indices of the classes that both know, 0-based; None where they are the same.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector | None = None,
        *,
        neck: bool = True,
        head: bool = True,
        backbone: bool = False,
        mask: str = "boxes",
        finest_scale: float = 56.0,
        alpha_fg: float = 4.0,
        alpha_bg: float = 16.0,
        decoupled_head: bool = True,
        beta_fg: float = 2.0,
        beta_bg: float = 2.0,
        temperature_fg: float = 1.0,
        temperature_bg: float = 1.0,
        class_pairs: list[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self.neck = neck and teacher is not None
        self.head = head and teacher is not None
        self.backbone = backbone and teacher is not None
        self.mask = mask
        self.finest_scale = finest_scale
        self.alphas = (alpha_fg, alpha_bg)
        self.decoupled_head = decoupled_head
        self.betas = (beta_fg, beta_bg)
        self.temperatures = (temperature_fg, temperature_bg)
        if class_pairs is not None:
            # The background column comes first in softmax logits and is shared by every pair of detectors.
            columns = [(0, 0)] + [(s + 1, t + 1) for s, t in class_pairs] if student.softmax else class_pairs
            self.register_buffer("student_columns", torch.tensor([s for s, _ in columns]), persistent=False)
            self.register_buffer("teacher_columns", torch.tensor([t for _, t in columns]), persistent=False)
        self.shares_all_classes = class_pairs is None

        self.neck_pairs = match_levels(student.strides, teacher.strides) if self.neck else []
        self.neck_adapters = build_adapters(
            [student.levels[s].channels for s, _ in self.neck_pairs],
            [teacher.levels[t].channels for _, t in self.neck_pairs],
        )
        self.stage_pairs = self._stage_pairs() if self.backbone else []
        self.stage_adapters = build_adapters(
            [student.stage_levels[s].channels for s, _ in self.stage_pairs],
            [teacher.stage_levels[t].channels for _, t in self.stage_pairs],
            relu=True,
        )

    def _stage_pairs(self) -> list[tuple[int, int]]:
        student, teacher = self.student.stage_levels, self.teacher.stage_levels
        pairs = match_levels([level.stride for level in student], [level.stride for level in teacher])
        return [(s, t) for s, t in pairs if student[s].stride in BACKBONE_STRIDES]

    @property
    def active(self) -> bool:
        """Whether the teacher supervises anything."""
        return self.neck or self.head or self.backbone

    def train(self, mode: bool = True) -> Distiller:
        """Switch the student and adapters; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: list[Tensor], targets: list[Target], warm: float = 1.0) -> Terms:
        """Every loss term of one batch.

        Args:
            images, targets: as `Detector.prepare` takes them; labels are the student's.
            warm: factor in [0, 1] on the distillation terms.
        """
        student, teacher = self.student, self.teacher
        batch = student.prepare(images, targets)
        stages = student.stages(batch)
        features = student.neck(stages)
        terms = Terms()
        for name, loss in student.detection_losses(features, batch).items():
            terms.weighted[name] = loss
            terms.raw[name] = loss.detach()
        if not self.active:
            return terms

        with torch.no_grad():
            teacher_stages = teacher.stages(batch)
            teacher_features = teacher.neck(teacher_stages)
        with torch.autocast(batch.pixels.device.type, enabled=False):
            if self.neck:
                masks = self._neck_masks(features, batch)
                self._imitate("neck", features, teacher_features, masks, batch, warm, terms)
            if self.backbone:
                shapes = [tuple(stage.shape[-2:]) for stage in stages]
                boxes = [target["boxes"] for target in batch.targets]
                masks = backbone_masks(boxes, shapes, [level.stride for level in student.stage_levels])
                self._imitate("backbone", stages, teacher_stages, masks, batch, warm, terms)
        if self.head:
            with torch.no_grad():
                regions = teacher.regions(teacher_features, batch)
                teacher_logits = teacher.classify(teacher_features, regions)
            student_logits = student.classify(features, regions)
            self._match_regions(student_logits, teacher_logits, regions, warm, terms)
        return terms

    def _neck_masks(self, features: list[Tensor], batch: Batch) -> list[Tensor]:
        return MASKS[self.mask](
            [target["boxes"] for target in batch.targets],
            [tuple(feature.shape[-2:]) for feature in features],
            self.student.strides,
            finest_scale=self.finest_scale,
            anchors=self.student.anchors(features, batch) if self.mask == "fine-grained" else None,
        )

    def _imitate(
        self,
        place: str,
        student: list[Tensor],
        teacher: list[Tensor],
        masks: list[Tensor],
        batch: Batch,
        warm: float,
        terms: Terms,
    ) -> None:
        """Decoupled imitation at one place, the mean over its levels (design 1.1 and 1.3)."""
        pairs, adapters = (
            (self.neck_pairs, self.neck_adapters) if place == "neck" else (self.stage_pairs, self.stage_adapters)
        )
        levels = self.student.levels if place == "neck" else self.student.stage_levels
        names = _level_names("P" if place == "neck" else "C", [level.stride for level in levels])
        shapes = [tuple(feature.shape[-2:]) for feature in student]
        valid = valid_masks(batch.valid, shapes, [level.stride for level in levels])
        losses = []
        for (s, t), adapter in zip(pairs, adapters, strict=True):
            adapted = adapter(student[s].to(next(adapter.parameters()).dtype))
            losses.append(imitation_loss(adapted, teacher[t], masks[s], 1.0, 1.0, valid=valid[s]))
        for group, values, weight in zip(("fg", "bg"), zip(*losses, strict=True), self.alphas, strict=True):
            name = f"{place}_{group}"
            loss = torch.stack(values).mean()
            terms.raw[name] = loss.detach()
            for (s, _), value in zip(pairs, values, strict=True):
                terms.raw[f"{name}/{names[s]}"] = value.detach()
            if weight > 0:
                terms.weighted[name] = weight * warm * loss

    def _match_regions(
        self, student_logits: Tensor, teacher_logits: Tensor, regions: Regions, warm: float, terms: Terms
    ) -> None:
        """Decoupled classification distillation on the teacher's regions (design 1.2)."""
        if not self.shares_all_classes:
            student_logits = student_logits.index_select(1, self.student_columns)
            teacher_logits = teacher_logits.index_select(1, self.teacher_columns)
        labels = torch.cat(regions.labels)
        divergence = region_kl if self.student.softmax else region_kl_sigmoid
        temperatures = dict(zip(("temperature_fg", "temperature_bg"), self.temperatures, strict=True))
        groups = divergence(student_logits, teacher_logits, labels > 0, valid=labels >= 0, **temperatures)
        for name, value, weight in zip(("head_fg", "head_bg"), groups, self.betas, strict=True):
            terms.raw[name] = value.detach()
            if self.decoupled_head and weight > 0:
                terms.weighted[name] = weight * warm * value
        if not self.decoupled_head:
            together, _ = divergence(
                student_logits,
                teacher_logits,
                torch.ones_like(labels, dtype=torch.bool),
                valid=labels >= 0,
                **temperatures,
            )
            terms.raw["head_all"] = together.detach()
            terms.weighted["head_all"] = self.betas[0] * warm * together


def _level_names(letter: str, strides: list[int]) -> list[str]:
    """`P3` for the level of stride 8; `P5`, `P5b` where two levels share stride 32."""
    names = [f"{letter}{round(math.log2(stride))}" for stride in strides]
    return [name + ("b" if name in names[:i] else "") for i, name in enumerate(names)]
