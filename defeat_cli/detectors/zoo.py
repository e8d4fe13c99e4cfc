"""Every detector that a recipe can name, and how it is built."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models import detection

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.backbones import finish_body, mobilenet_stage_ends
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.conventions import refuse_thinning, transform_settings
from defeat_cli.detectors.faster_rcnn import FasterRCNNDetector, build_faster_rcnn
from defeat_cli.detectors.fcos import FCOSDetector, build_fcos
from defeat_cli.detectors.retinanet import RetinaNetDetector, build_retinanet

Build = Callable[[Architecture, int, list[int], int], nn.Module]
"""(architecture, classes without background, short sides, long side) -> torchvision model."""


def build_by_name(architecture: Architecture, num_classes: int, short_side: list[int], long_side: int) -> nn.Module:
    """The model of torchvision's builder of that name, without weights.

    The builder decides everything but the image size. Its backbone's norms and frozen stages, which torchvision sets by
    the weights it is given, come from the architecture.
    """
    refuse_thinning(architecture)
    model = detection.__dict__[architecture.detector](
        weights=None,
        weights_backbone=None,
        num_classes=num_classes + 1,
        **transform_settings(architecture, short_side, long_side),
    )
    body = model.backbone.body
    if "layer1" in body:
        last = [f"layer{stage}" for stage in range(1, 5)]
    else:
        last = [str(index) for index in mobilenet_stage_ends(body)]
    finish_body(body, last, architecture)
    return model


DETECTORS: dict[str, tuple[type[Detector], Build]] = {
    "faster_rcnn": (FasterRCNNDetector, build_faster_rcnn),
    "retinanet": (RetinaNetDetector, build_retinanet),
    "fcos": (FCOSDetector, build_fcos),
    "fasterrcnn_resnet50_fpn": (FasterRCNNDetector, build_by_name),
    "fasterrcnn_resnet50_fpn_v2": (FasterRCNNDetector, build_by_name),
    "fasterrcnn_mobilenet_v3_large_fpn": (FasterRCNNDetector, build_by_name),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (FasterRCNNDetector, build_by_name),
    "retinanet_resnet50_fpn": (RetinaNetDetector, build_by_name),
    "retinanet_resnet50_fpn_v2": (RetinaNetDetector, build_by_name),
    "fcos_resnet50_fpn": (FCOSDetector, build_by_name),
}
"""Detectors by the name that `student.detector` gives them: the contract's class, and what builds the model."""


def build_detector(architecture: Architecture, classes: list[str], short_side: list[int], long_side: int) -> Detector:
    """A detector with random weights.

    Args:
        classes: names, background not among them.
        short_side: short sides that training draws from; the last one is used at evaluation.
        long_side: the long side is kept at or below this.

    Raises:
        RecipeError: keys of the architecture that do not go together.
    """
    kind, build = DETECTORS[architecture.detector]
    return kind(build(architecture, len(classes), short_side, long_side), classes)
