"""What RetinaNet and FCOS have in common as detectors: a sigmoid classifier over every anchor or point."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from defeat_cli.detectors.contract import (
    Batch,
    RegionClassifier,
    Regions,
    Target,
    TorchvisionDetector,
    at_least_float32,
    image_list,
)


class OneStageDetector(TorchvisionDetector):
    """A detector whose regions are all anchors of an image, level after level, those of one cell side by side."""

    softmax = False

    @abstractmethod
    def _compute_loss(
        self, owner: object, targets: list[Target], outputs: dict, anchors: list[Tensor], features: list[Tensor]
    ) -> object:
        """torchvision's `compute_loss` with `owner` as its `self`: it matches anchors, then calls `owner.head`."""

    def region_obstacle(self, teacher: RegionClassifier) -> str | None:
        if reason := super().region_obstacle(teacher):
            return reason
        if type(self) is not type(teacher) or self.strides != teacher.strides:
            return "one-stage detectors of different kinds or strides classify different anchors"
        # Each cell has the same anchors in the same order, to a pixel or a tenth of their side.
        ours, theirs = (detector.model.anchor_generator.cell_anchors for detector in (self, teacher))
        if not all(
            a.shape == b.shape and torch.allclose(a, b.to(a.device), rtol=0.1, atol=1.0)
            for a, b in zip(ours, theirs, strict=True)
        ):
            return "the detectors have different anchors; their heads do not classify the same boxes"
        return None

    @torch.no_grad()
    def regions(self, features: list[Tensor], batch: Batch) -> Regions:
        """Every anchor, with the label that torchvision's own matching gives it in training."""
        anchors = self.model.anchor_generator(image_list(batch), features)
        matched = self._compute_loss(_Matching(self.model), batch.targets, {}, anchors, features)
        labels = [_label(target["labels"], of_image) for target, of_image in zip(batch.targets, matched, strict=True)]
        return Regions(anchors, labels, batch.sizes)

    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The named losses of torchvision's head, in any mode."""
        outputs = {name: at_least_float32(output) for name, output in self.model.head(features).items()}
        anchors = self.model.anchor_generator(image_list(batch), features)
        return self._compute_loss(self.model, batch.targets, outputs, anchors, features)

    def classify(self, features: list[Tensor], regions: Regions) -> Tensor:
        """[N * A, K] sigmoid logits of all anchors; torchvision's unused background column is left out."""
        logits = self.model.head.classification_head(features)
        return logits[..., 1:].flatten(0, 1)


class _Matching:
    """Stands in for a model in `compute_loss`, and for its head, to get at the matching that happens on the way."""

    def __init__(self, model: object) -> None:
        self.model = model
        self.head = self

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def compute_loss(
        self, targets: list[Target], outputs: dict, anchors: list[Tensor], matched: list[Tensor]
    ) -> list[Tensor]:
        """Instead of losses, one [A] per image: index of the matched box, -1 for none, -2 for one to be ignored."""
        return matched


def _label(classes: Tensor, matched: Tensor) -> Tensor:
    """[A] labels from the box that each anchor is matched to: its class, 0 for background, -1 for ignored."""
    table = F.pad(classes, (0, 2))
    # Index -1 finds the last entry, background; -2 the one before it.
    table[-2] = -1
    return table[matched]
