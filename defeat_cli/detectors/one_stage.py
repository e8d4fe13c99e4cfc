"""What RetinaNet and FCOS have in common as detectors: a sigmoid classifier over every anchor or point."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from defeat_cli.detectors.contract import Batch, Detector, Regions, Target, at_least_float32, image_list


class OneStageDetector(Detector):
    """A detector whose regions are all anchors of an image, level after level, those of one cell side by side."""

    softmax = False

    @property
    def anchor_generator(self) -> AnchorGenerator:
        return self.model.anchor_generator

    @abstractmethod
    def _compute_loss(
        self, owner: object, targets: list[Target], outputs: dict, anchors: list[Tensor], features: list[Tensor]
    ) -> object:
        """torchvision's `compute_loss` with `owner` as its `self`: it matches anchors, then calls `owner.head`."""

    @torch.no_grad()
    def regions(self, features: list[Tensor], batch: Batch) -> Regions:
        """Every anchor, with the label that torchvision's own matching gives it in training."""
        anchors = self.model.anchor_generator(image_list(batch), features)
        matched = self._compute_loss(_Matching(self.model), batch.targets, {}, anchors, features)
        labels = [_label(target["labels"], of_image) for target, of_image in zip(batch.targets, matched, strict=True)]
        return Regions(anchors, labels, batch.sizes)

    def detection_losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
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
