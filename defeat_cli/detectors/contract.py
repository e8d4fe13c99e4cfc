"""The Detector contract: what distillation needs of a detector, and no more.

A detector wraps a torchvision model (`self.model`) and calls that model's own modules one at a time, so that the parts
in turn give bit for bit what `self.model.forward` gives. The wrapped model's state dict is what users take away.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

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
        images, _, height, width = self.pixels.shape
        valid = torch.zeros(images, height, width, dtype=torch.bool, device=self.pixels.device)
        # Filling slices instead of comparing with a tensor of sizes spares the device a synchronising copy.
        for image, (own_height, own_width) in zip(valid, self.sizes, strict=True):
            image[:own_height, :own_width] = True
        return valid

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
    """A torchvision detector seen through the parts that distillation needs.

    model: the torchvision detector, whose `transform` resizes and normalises.
    classes: class names; label `i + 1` is `classes[i]`, label 0 is background.
    """

    softmax: bool
    """True where `classify` gives softmax logits with background first, False for one sigmoid per class."""

    has_anchors = True
    """False where the head classifies points, which anchors only stand for."""

    def __init__(self, model: nn.Module, classes: list[str]) -> None:
        super().__init__()
        self.model = model
        self.classes = list(classes)
        # Kept on the device and in double precision, so that they round to what torchvision computes with.
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(model.transform, name), dtype=torch.float64)
            self.register_buffer(name, values[:, None, None], persistent=False)

    def prepare(self, images: list[Tensor], targets: list[Target] | None = None) -> Batch:
        """Resize, pad and stack.

        Args:
            images: each [3, H, W], RGB, uint8 or floats in [0, 1].
            targets: boxes in the pixels of their image.
        """
        transform = self.model.transform
        resized, resized_targets, sizes = [], [], []
        for i, image in enumerate(images):
            pixels = image if image.is_floating_point() else image.float().div_(255)
            target = dict(targets[i]) if targets is not None else None
            pixels, target = transform.resize(pixels, target)
            resized.append(pixels)
            resized_targets.append(target)
            sizes.append((pixels.shape[-2], pixels.shape[-1]))
        pixels = transform.batch_images(resized, size_divisible=transform.size_divisible)
        return Batch(pixels, sizes, resized_targets if targets is not None else None)

    def normalized(self, batch: Batch) -> Tensor:
        """[N, 3, H, W] as the backbone wants it: normalised, and 0 on the padding as torchvision has it."""
        pixels = batch.pixels
        mean, std = self.image_mean.to(pixels.dtype), self.image_std.to(pixels.dtype)
        return ((pixels - mean) / std) * batch.valid[:, None]

    def stages(self, batch: Batch) -> list[Tensor]:
        """Backbone stage outputs that feed the neck, finest first."""
        return list(self.model.backbone.body(self.normalized(batch)).values())

    def neck(self, stages: list[Tensor]) -> list[Tensor]:
        """FPN features from backbone stages, finest first, each [N, C, h, w].

        They are float32 under autocast too: torchvision computes anchors and boxes in the dtype of the features, and at
        1000 pixels bfloat16 has steps of 8.
        """
        named = OrderedDict((str(i), stage) for i, stage in enumerate(stages))
        return [at_least_float32(feature) for feature in self.model.backbone.fpn(named).values()]

    def features(self, batch: Batch) -> list[Tensor]:
        """FPN features of a batch, finest first, each [N, C_l, h_l, w_l]; `strides` names them."""
        return self.neck(self.stages(batch))

    @property
    @abstractmethod
    def anchor_generator(self) -> AnchorGenerator:
        """What places anchors on the FPN levels: those of the RPN, or of a one-stage head."""

    @property
    def anchors_per_cell(self) -> int:
        """Anchors on each cell of a level; all levels have as many, for they share a head."""
        return self.anchor_generator.num_anchors_per_location()[0]

    def anchors(self, features: list[Tensor], batch: Batch) -> list[Tensor]:
        """Anchors of each level, [h_l * w_l * A, 4] xyxy in network-input pixels; all images of a batch share them."""
        counts = [feature.shape[-2] * feature.shape[-1] * self.anchors_per_cell for feature in features]
        of_one_image = self.anchor_generator(ImageList(batch.pixels, batch.sizes[:1]), features)[0]
        return list(of_one_image.split(counts))

    @abstractmethod
    def regions(self, features: list[Tensor], batch: Batch) -> Regions:
        """Boxes to classify, with the class each is matched to."""

    @abstractmethod
    def detection_losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The detector's own losses as named scalars, those of torchvision's training forward."""

    @abstractmethod
    def classify(self, features: list[Tensor], regions: Regions) -> Tensor:
        """Class logits of the regions, images one after another.

        Returns:
            [R, K + 1] softmax logits with background first where `softmax`, else [R, K] sigmoid logits.
        """

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Final detections: `boxes` xyxy in each image's own pixels, `scores`, `labels` in 1..K. Needs eval mode."""
        return self.model([image if image.is_floating_point() else image.float().div_(255) for image in images])

    @cached_property
    def levels(self) -> list[Level]:
        """Strides and channels of the FPN levels, measured on a real forward pass."""
        return self._measured[1]

    @cached_property
    def stage_levels(self) -> list[Level]:
        """Strides and channels of the backbone stages that feed the neck."""
        return self._measured[0]

    @property
    def strides(self) -> list[int]:
        return [level.stride for level in self.levels]

    @cached_property
    def _measured(self) -> tuple[list[Level], list[Level]]:
        side = 128
        parameter = next(self.parameters())
        modes = {module: module.training for module in self.modules()}
        pixels = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
        self.eval()
        try:
            with torch.no_grad():
                stages = self.stages(Batch(pixels, [(side, side)]))
                features = self.neck(stages)
        finally:
            for module, training in modes.items():
                module.training = training
        return (
            [Level(side // f.shape[-1], f.shape[1]) for f in stages],
            [Level(side // f.shape[-1], f.shape[1]) for f in features],
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def image_list(batch: Batch) -> ImageList:
    """The batch as torchvision's modules take it; they read shapes and sizes only."""
    return ImageList(batch.pixels, batch.sizes)


def level_names(letter: str, strides: Sequence[int]) -> list[str]:
    """`P3` for stride 8 and letter P; levels that share a stride are `P5`, `P5b`, `P5c` …, in their order."""
    names: list[str] = []
    for i, stride in enumerate(strides):
        earlier = list(strides[:i]).count(stride)
        names.append(f"{letter}{round(math.log2(stride))}" + (chr(ord("a") + earlier) if earlier else ""))
    return names
