"""The Detector contract: what distillation needs of a detector, and no more, in parts that it may have or not.

    Detector            prepare, features, levels, losses, detect
    + Stages            stages, neck: backbone distillation
    + Anchored          anchors: masks that compare anchors with boxes
    + RegionClassifier  regions, classify: head distillation
    + CellClassifier    cell_logits: where the detector is sure of an object
    + DenseHead         towers, predict: cross-head distillation

A term asks for the parts that it needs and says so where one is missing. `TorchvisionDetector` has what all torchvision
detectors share; `FeatureDetector` makes a detector of any module, for terms at the neck.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from defeat_cli.detectors.batched import on_device, resized_targets, target_on
from defeat_cli.detectors.modes import evaluating
from defeat_cli.errors import DefeatError

OUTLINES = {"masks", "keypoints"}
"""What targets of torchvision may have beside boxes in the pixels of their image."""

Target = dict[str, Tensor]
"""`boxes` [M, 4] xyxy pixels float32, `labels` [M] int64 in 1..K (0 is background)."""


@dataclass(frozen=True)
class Batch:
    """Images resized and padded to one shape.

    pixels: [N, 3, H, W] in [0, 1], RGB; padding is 0.
    sizes: (height, width) of each image's own area, from the top left corner.
    targets: one per image, boxes in the pixels of the resized image; None at inference.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]
    targets: list[Target] | None = None

    @cached_property
    def valid(self) -> Tensor:
        """[N, H, W] bool, True on each image's own area and False on padding."""
        device = self.pixels.device
        heights, widths = on_device(self.sizes, device)[..., None, None].unbind(1)
        rows, columns = (torch.arange(side, device=device) for side in self.pixels.shape[-2:])
        return (rows[:, None] < heights) & (columns < widths)

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with pixels and boxes as `dtype` (float64 for exact checks)."""
        targets = self.targets and [{**t, "boxes": t["boxes"].to(dtype)} for t in self.targets]
        return replace(self, pixels=self.pixels.to(dtype), targets=targets)


@dataclass(frozen=True)
class Regions:
    """Boxes that heads classify: sampled proposals (two-stage) or all anchors or points (one-stage).

    boxes: one [R_i, 4] per image, xyxy in network-input pixels.
    labels: one [R_i] int64 per image: matched class in 1..K, 0 for background, -1 for ignored.
    sizes: (height, width) of each image's own area, as in the batch.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class Level:
    """One feature map of a detector: its stride in input pixels and its channels."""

    stride: int
    channels: int


class Detector(nn.Module, ABC):
    """A detector seen through the parts that distillation needs.

    model: the module that is trained; its state dict is what users take away.
    classes: class names; label `i + 1` is `classes[i]`, label 0 is background.
    divisible: sides of a batch are padded to a multiple of it.
    """

    divisible: int = 32

    def __init__(self, model: nn.Module, classes: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.classes = list(classes)

    @abstractmethod
    def prepare(self, images: list[Tensor], targets: list[Target] | None = None) -> Batch:
        """Resize, pad and stack.

        Args:
            images: each [3, H, W], RGB, uint8 or floats in [0, 1], on the detector's device.
            targets: boxes in the pixels of their image, on the CPU or on the device; those of the batch are there.
        """

    @abstractmethod
    def features(self, batch: Batch) -> list[Tensor]:
        """FPN features of a batch, finest first, each [N, C_l, h_l, w_l]; `strides` names them."""

    @abstractmethod
    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The detector's own losses as named scalars. Needs training mode."""

    @abstractmethod
    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Final detections: `boxes` xyxy in each image's own pixels, `scores`, `labels` in 1..K. Needs eval mode."""

    def detections(self, features: list[Tensor], batch: Batch) -> list[dict[str, Tensor]]:
        """Final detections on a batch, `boxes` in its pixels. Needs eval mode.

        Those of `detect` on the images as they were resized; a detector that can go on from its features does.
        """
        return self.detect(
            [i[:, :height, :width] for i, (height, width) in zip(batch.pixels, batch.sizes, strict=True)]
        )

    @cached_property
    def levels(self) -> list[Level]:
        """Strides and channels of the FPN levels, measured on a real forward pass."""
        return self._measured(self.features)

    @property
    def strides(self) -> list[int]:
        return [level.stride for level in self.levels]

    def _measured(self, maps: Callable[[Batch], list[Tensor]]) -> list[Level]:
        side = 128
        parameter = next(self.parameters())
        pixels = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
        with evaluating(self):
            return [Level(side // m.shape[-1], m.shape[1]) for m in maps(Batch(pixels, [(side, side)]))]


class Stages(ABC):
    """A detector whose features are made of backbone stages by a neck: `features` is `neck` of `stages`."""

    @abstractmethod
    def stages(self, batch: Batch) -> list[Tensor]:
        """Backbone stage outputs that feed the neck, finest first."""

    @abstractmethod
    def neck(self, stages: list[Tensor]) -> list[Tensor]:
        """FPN features from backbone stages, finest first, each [N, C, h, w]."""

    @cached_property
    def stage_levels(self) -> list[Level]:
        """Strides and channels of the backbone stages that feed the neck."""
        return self._measured(self.stages)


class Anchored(ABC):
    """A detector that compares anchors with boxes."""

    @abstractmethod
    def anchors(self, features: list[Tensor], batch: Batch) -> list[Tensor]:
        """Anchors of each level, [h_l * w_l * A, 4] xyxy in network-input pixels; all images of a batch share them."""


class RegionClassifier(ABC):
    """A detector that classifies regions: proposals, anchors or points."""

    softmax: bool
    """True where `classify` gives softmax logits with background first, False for one sigmoid per class."""

    @abstractmethod
    def regions(self, features: list[Tensor], batch: Batch) -> Regions:
        """Boxes to classify, with the class each is matched to."""

    def region_obstacle(self, teacher: RegionClassifier) -> str | None:
        """Why this detector's head cannot classify the regions of another's; None where it can."""
        if self.softmax != teacher.softmax:
            return "one detector classifies proposals, the other anchors; there are no regions that both heads take"
        return None

    @abstractmethod
    def classify(self, features: list[Tensor], regions: Regions) -> Tensor:
        """Class logits of the regions, images one after another.

        Returns:
            [R, K + 1] softmax logits with background first where `softmax`, else [R, K] sigmoid logits.
        """


class CellClassifier(ABC):
    """A detector whose head scores the cells of its features: for classes, or as places of objects."""

    @abstractmethod
    def cell_logits(self, features: list[Tensor]) -> list[Tensor]:
        """Sigmoid logits of each level, [N, A, K, h, w]: A anchors a cell and K classes, K = 1 for objectness."""

    @abstractmethod
    def cell_obstacle(self, teacher: Detector) -> str | None:
        """Why this detector's cells are not scored for the same anchors as a teacher's; None where they are."""


class DenseHead(ABC):
    """A detector with a class tower and a box tower of convolutions that run over every level of its features."""

    @property
    @abstractmethod
    def tower_channels(self) -> tuple[int, int]:
        """Channels of the class and of the box map before the last convolution of their towers."""

    @abstractmethod
    def towers(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Class and box map of each level, [N, C, h, w], before the last convolution of their towers."""

    @abstractmethod
    def predict(self, towers: list[tuple[Tensor, Tensor]], batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """What the last convolutions and the predictors make of such maps, one pair a level of this detector.

        Returns:
            For each level the class logits [N, h * w * A, K] and the boxes [N, h * w * A, 4], xyxy in network-input
            pixels, not clipped. Float32 at least.
        """


class TorchvisionDetector(Detector, Stages, RegionClassifier, CellClassifier):
    """What torchvision's detectors share.

    It calls the model's own modules one at a time, so that the parts in turn give bit for bit what `model.forward`
    gives from a prepared batch on.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str]) -> None:
        super().__init__(model, classes)
        # Kept on the model's device and in double precision, so that they round to what torchvision computes with.
        device = next(model.parameters()).device
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(model.transform, name), dtype=torch.float64).to(device)
            self.register_buffer(name, values[:, None, None], persistent=False)
        self._anchors: tuple[tuple, Tensor] | None = None

    def prepare(self, images: list[Tensor], targets: list[Target] | None = None) -> Batch:
        transform = self.model.transform
        # Boxes are resized together; what else torchvision resizes, for a Mask R-CNN say, is left to it.
        outlined = [target if OUTLINES & target.keys() else None for target in targets or [{}] * len(images)]
        pairs = [transform.resize(in_unit_range(i), t and dict(t)) for i, t in zip(images, outlined, strict=True)]
        resized = [image for image, _ in pairs]
        old, new = ([(image.shape[-2], image.shape[-1]) for image in some] for some in (images, resized))
        pixels = transform.batch_images(resized, size_divisible=transform.size_divisible)
        if targets is not None:
            others = [{key: target[key] for key in OUTLINES & target.keys()} if target else {} for _, target in pairs]
            targets = [{**target, **other} for target, other in zip(targets, others, strict=True)]
            targets = resized_targets(targets, old, new, pixels.device)
        return Batch(pixels, new, targets)

    @property
    def divisible(self) -> int:
        return self.model.transform.size_divisible

    def normalized(self, batch: Batch) -> Tensor:
        """[N, 3, H, W] as the backbone wants it: normalised, and 0 on the padding as torchvision has it."""
        pixels = batch.pixels
        mean, std = self.image_mean.to(pixels.dtype), self.image_std.to(pixels.dtype)
        return ((pixels - mean) / std) * batch.valid[:, None]

    def stages(self, batch: Batch) -> list[Tensor]:
        return list(self.model.backbone.body(self.normalized(batch)).values())

    def neck(self, stages: list[Tensor]) -> list[Tensor]:
        """FPN features, float32 under autocast too: torchvision computes anchors and boxes in the dtype of the
        features, and at 1000 pixels bfloat16 has steps of 8."""
        named = OrderedDict((str(i), stage) for i, stage in enumerate(stages))
        return [at_least_float32(feature) for feature in self.model.backbone.fpn(named).values()]

    def features(self, batch: Batch) -> list[Tensor]:
        return self.neck(self.stages(batch))

    @property
    @abstractmethod
    def anchor_generator(self) -> AnchorGenerator:
        """What places anchors, or points, on the FPN levels."""

    def anchors_of_image(self, features: list[Tensor], batch: Batch) -> Tensor:
        """[A, 4] anchors of all levels, xyxy in network-input pixels, that all images of a batch share.

        Those of the last shape are kept.
        """
        first, generator = features[0], self.anchor_generator
        shapes = (batch.pixels.shape[-2:], *(feature.shape[-2:] for feature in features))
        key = (generator, shapes, first.dtype, first.device)
        if self._anchors is None or self._anchors[0] != key:
            self._anchors = key, generator(ImageList(batch.pixels, batch.sizes[:1]), features)[0]
        return self._anchors[1]

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return self.model([in_unit_range(image) for image in images])


class TorchvisionAnchors(Anchored):
    """The anchors of a torchvision detector, those of its RPN or of its one-stage head."""

    def anchors(self, features: list[Tensor], batch: Batch) -> list[Tensor]:
        # All levels have as many anchors a cell, for they share a head.
        a_cell = self.anchor_generator.num_anchors_per_location()[0]
        counts = [feature.shape[-2] * feature.shape[-1] * a_cell for feature in features]
        return list(self.anchors_of_image(features, batch).split(counts))


def anchor_obstacle(ours: AnchorGenerator, theirs: AnchorGenerator) -> str | None:
    """Why two detectors' anchors are not the same; None where each cell has the same ones in the same order, to a pixel
    or a tenth of their side."""
    pairs = list(zip(ours.cell_anchors, theirs.cell_anchors, strict=False))
    if len(ours.cell_anchors) == len(theirs.cell_anchors) and all(
        a.shape == b.shape and torch.allclose(a, b.to(a.device), rtol=0.1, atol=1.0) for a, b in pairs
    ):
        return None
    return "the detectors have different anchors; their heads do not classify the same boxes"


class FeatureDetector(Detector):
    """A detector made of any module by three functions, for terms at the neck.

    Args:
        model: what is trained, or teaches.
        classes: class names.
        features: (model, batch) -> [N, C_l, h_l, w_l] of each level, finest first. Strides are measured on an image of
            128 x 128 pixels.
        losses: (model, features, batch) -> the detection losses by name. A teacher needs none.
        detect: (model, images) -> one dict of `boxes`, `scores`, `labels` an image; needed for evaluation only.
        size: (height, width) that images are resized to; None keeps them, padded to the largest of the batch, rounded
            up to a multiple of `divisible`.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        features: Callable[[nn.Module, Batch], list[Tensor]],
        losses: Callable[[nn.Module, list[Tensor], Batch], dict[str, Tensor]] | None = None,
        detect: Callable[[nn.Module, list[Tensor]], list[dict[str, Tensor]]] | None = None,
        size: tuple[int, int] | None = None,
        divisible: int = 32,
    ) -> None:
        super().__init__(model, classes)
        self._features, self._losses, self._detect = features, losses, detect
        self.size, self.divisible = size, divisible

    def prepare(self, images: list[Tensor], targets: list[Target] | None = None) -> Batch:
        images = [in_unit_range(image) for image in images]
        if targets is not None:
            device = images[0].device
            targets = [target_on(target, device) for target in targets]
        if self.size is not None:
            if targets is not None:
                targets = [
                    {**target, "boxes": scaled(target["boxes"], image.shape[-2:], self.size)}
                    for image, target in zip(images, targets, strict=True)
                ]
            images = [
                F.interpolate(image[None], self.size, mode="bilinear", align_corners=False)[0] for image in images
            ]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (math.ceil(max(side) / self.divisible) * self.divisible for side in zip(*sizes, strict=True))
        pixels = torch.stack([F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images])
        return Batch(pixels, sizes, targets)

    def features(self, batch: Batch) -> list[Tensor]:
        return [at_least_float32(feature) for feature in self._features(self.model, batch)]

    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        if self._losses is None:
            raise DefeatError("FeatureDetector: give it `losses`, without which it can teach but not learn")
        return self._losses(self.model, features, batch)

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        if self._detect is None:
            raise DefeatError("FeatureDetector: give it `detect`, without which it cannot be evaluated")
        return self._detect(self.model, images)


def level_names(letter: str, strides: Sequence[int]) -> list[str]:
    """`P3` for the level of stride 8; where levels share a stride `P5`, `P5b`, `P5c`."""
    names: list[str] = []
    seen: Counter[int] = Counter()
    for stride in strides:
        names.append(f"{letter}{round(math.log2(stride))}" + " bcdefgh"[seen[stride]].strip())
        seen[stride] += 1
    return names


def scaled(boxes: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Boxes [M, 4] xyxy of an image of `old` (height, width) on the same image of `new`."""
    down, across = new[0] / old[0], new[1] / old[1]
    factors = torch.tensor([across, down, across, down], dtype=boxes.dtype)
    return boxes * factors.to(boxes.device, non_blocking=True)


def in_unit_range(image: Tensor) -> Tensor:
    """An image as floats in [0, 1]; uint8 is divided by 255."""
    return image if image.is_floating_point() else image.float().div_(255)


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
