"""What RetinaNet and FCOS have in common as detectors: a sigmoid classifier over every anchor or point."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defeat_cli.detectors.contract import (
    Batch,
    DenseHead,
    Detector,
    RegionClassifier,
    Regions,
    Target,
    TorchvisionDetector,
    anchor_obstacle,
    at_least_float32,
)


class OneStageDetector(TorchvisionDetector, DenseHead):
    """A detector whose regions are all anchors of an image, level after level, those of one cell side by side."""

    softmax = False

    @abstractmethod
    def match(self, boxes: list[Tensor], anchors: Tensor, features: list[Tensor]) -> Tensor:
        """torchvision's own matching of an image's boxes, [M_i, 4], with its anchors or points, [A, 4].

        Returns:
            [N, A]: index of the box that an anchor belongs to, -1 for none, -2 for an anchor that is ignored.
        """

    def region_obstacle(self, teacher: RegionClassifier) -> str | None:
        if reason := super().region_obstacle(teacher):
            return reason
        if type(self) is not type(teacher) or self.strides != teacher.strides:
            return "one-stage detectors of different kinds or strides classify different anchors"
        return anchor_obstacle(self.model.anchor_generator, teacher.model.anchor_generator)

    @torch.no_grad()
    def regions(self, features: list[Tensor], batch: Batch) -> Regions:
        """Every anchor, with the label that torchvision's own matching gives it in training."""
        anchors = self.anchors_of_image(features, batch)
        matched = self.match([target["boxes"] for target in batch.targets], anchors, features)
        labels = [_label(target["labels"], of_image) for target, of_image in zip(batch.targets, matched, strict=True)]
        return Regions([anchors] * len(labels), labels, batch.sizes)

    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The named losses of torchvision's head, in any mode."""
        outputs, anchors = self._outputs(features, batch)
        matched = self.match([target["boxes"] for target in batch.targets], anchors[0], features)
        if not self._plain:
            return self.model.head.compute_loss(batch.targets, outputs, anchors, list(matched))
        return self._losses(outputs, anchors[0], batch.targets, matched)

    @property
    @abstractmethod
    def _plain(self) -> bool:
        """Whether the head learns as torchvision's own does; a user's model may have another."""

    @abstractmethod
    def _losses(
        self, outputs: dict[str, Tensor], anchors: Tensor, targets: list[Target], matched: Tensor
    ) -> dict[str, Tensor]:
        """torchvision's losses of the head, with few waits of the host and numbers equal to the last bit.

        Args:
            outputs: what the head says of each anchor, [N, A, ·] by name.
            anchors: [A, 4].
            matched: [N, A], as `match` gives it.
        """

    def detections(self, features: list[Tensor], batch: Batch) -> list[dict[str, Tensor]]:
        outputs, anchors = self._outputs(features, batch)
        cells = [feature.shape[-2] * feature.shape[-1] for feature in features]
        a_cell = len(anchors[0]) // sum(cells)
        counts = [number * a_cell for number in cells]
        by_level = {name: list(output.split(counts, dim=1)) for name, output in outputs.items()}
        anchors_by_level = [list(of_image.split(counts)) for of_image in anchors]
        return self.model.postprocess_detections(by_level, anchors_by_level, batch.sizes)

    def _outputs(self, features: list[Tensor], batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What the head says, [N, A, ·] by name, and the anchors that it says it of, one [A, 4] an image."""
        outputs = {name: at_least_float32(output) for name, output in self.model.head(features).items()}
        return outputs, [self.anchors_of_image(features, batch)] * len(batch.sizes)

    def classify(self, features: list[Tensor], regions: Regions) -> Tensor:
        """[N * A, K] sigmoid logits of all anchors; torchvision's unused background column is left out."""
        logits = self.model.head.classification_head(features)
        return logits[..., 1:].flatten(0, 1)

    def cell_logits(self, features: list[Tensor]) -> list[Tensor]:
        """Logits of the classes, [N, A, K, h, w] a level; torchvision's unused background column is left out."""
        head = self.model.head.classification_head
        maps = [head.cls_logits(head.conv(feature)) for feature in features]
        return [logits.unflatten(1, (-1, head.num_classes))[:, :, 1:] for logits in maps]

    def cell_obstacle(self, teacher: Detector) -> str | None:
        if not isinstance(teacher, RegionClassifier):
            return "the teacher does not score cells"
        return self.region_obstacle(teacher)

    @property
    def tower_channels(self) -> tuple[int, int]:
        return tuple(last[0].in_channels for _, last in self._split_towers())

    def towers(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        (of_classes, _), (of_boxes, _) = self._split_towers()
        return [(of_classes(feature), of_boxes(feature)) for feature in features]

    def predict(self, towers: list[tuple[Tensor, Tensor]], batch: Batch) -> list[tuple[Tensor, Tensor]]:
        (_, last_of_classes), (_, last_of_boxes) = self._split_towers()
        classifier = self.model.head.classification_head
        anchors = self.anchors_of_image([class_map for class_map, _ in towers], batch)
        outputs = []
        for class_map, box_map in towers:
            logits = _by_anchor(classifier.cls_logits(last_of_classes(class_map)), classifier.num_classes)
            deltas = _by_anchor(self._box_outputs(last_of_boxes(box_map)), 4)
            of_level, anchors = anchors[: deltas.shape[1]], anchors[deltas.shape[1] :]
            boxes = self._decode(deltas.flatten(0, 1), of_level.repeat(len(deltas), 1)).view_as(deltas)
            outputs.append((logits[..., 1:], boxes))
        return outputs

    def _split_towers(self) -> list[tuple[nn.Sequential, nn.Sequential]]:
        """The class tower and the box tower, each before its last convolution and from there on."""
        return [_split(head.conv) for head in (self.model.head.classification_head, self.model.head.regression_head)]

    def _box_outputs(self, box_map: Tensor) -> Tensor:
        """What the box predictor makes of the end of its tower: [N, C, h, w] -> [N, A * 4, h, w]."""
        return self.model.head.regression_head.bbox_reg(box_map)

    @abstractmethod
    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes from predictor outputs and anchors: [R, 4] each -> [R, 4] xyxy pixels."""


def _by_anchor(outputs: Tensor, columns: int) -> Tensor:
    """Outputs of a map in the order of its anchors: [N, A * columns, h, w] -> [N, h * w * A, columns], float32."""
    return at_least_float32(outputs.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3))


def _split(tower: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
    """A tower of convolutions, norms and activations, however nested, before its last convolution and from there on."""
    layers = [layer for layer in tower.modules() if not list(layer.children())]
    last = max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d))
    return nn.Sequential(*layers[:last]), nn.Sequential(*layers[last:])


def _label(classes: Tensor, matched: Tensor) -> Tensor:
    """[A] labels from the box that each anchor is matched to: its class, 0 for background, -1 for ignored."""
    table = F.pad(classes, (0, 2))
    # Index -1 finds the last entry, background; -2 the one before it.
    table[-2] = -1
    return table[matched]
