"""Every detector that a recipe can name, and how it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torchvision.models import detection

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.backbones import finish_body, mobilenet_stage_ends
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.conventions import refuse_thinning, transform_settings
from defeat_cli.detectors.faster_rcnn import FasterRCNNDetector, build_faster_rcnn
from defeat_cli.detectors.fcos import FCOSDetector, build_fcos
from defeat_cli.detectors.retinanet import RetinaNetDetector, build_retinanet
from defeat_cli.errors import DefeatError
from defeat_cli.text import counted

Build = Callable[[Architecture, int, list[int], int], nn.Module]
"""(architecture, classes without background, short sides, long side) -> torchvision model."""


def build_by_name(architecture: Architecture, num_classes: int, short_side: list[int], long_side: int) -> nn.Module:
    """The model of torchvision's builder of that name, without weights.

    The builder decides what the detector is made of. Image sizes, thresholds, counts and the backbone's norms and
    frozen stages come from the architecture, which has the builder's own where nobody says otherwise.
    """
    refuse_thinning(architecture)
    a = architecture
    if a.detector.startswith("fasterrcnn"):
        settings = {
            "box_score_thresh": a.score_threshold,
            "box_nms_thresh": a.nms_threshold,
            "box_detections_per_img": a.detections_per_image,
            "box_batch_size_per_image": a.regions_per_image,
            "rpn_nms_thresh": a.proposal_nms_threshold,
            "rpn_pre_nms_top_n_test": a.proposals_before_nms or a.proposals,
            "rpn_post_nms_top_n_test": a.proposals,
            **{f"rpn_{when}_nms_top_n_train": a.proposals_train for when in ("pre", "post")},
        }
    else:
        settings = {
            "score_thresh": a.score_threshold,
            "nms_thresh": a.nms_threshold,
            "detections_per_img": a.detections_per_image,
            "topk_candidates": a.candidates_per_level,
        }
    model = detection.__dict__[architecture.detector](
        weights=None,
        weights_backbone=None,
        num_classes=num_classes + 1,
        **transform_settings(architecture, short_side, long_side),
        **settings,
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


WRAPPERS: tuple[tuple[type[nn.Module], type[Detector]], ...] = (
    (detection.FasterRCNN, FasterRCNNDetector),
    (detection.RetinaNet, RetinaNetDetector),
    (detection.FCOS, FCOSDetector),
)
"""torchvision's models, and what makes a detector of each."""


def wrap(model: nn.Module, classes: Sequence[str]) -> Detector:
    """A detector of a torchvision model, which stays the same object and is trained in place.

    Args:
        model: a `FasterRCNN`, `RetinaNet` or `FCOS`, on a backbone with an FPN.
        classes: names, background not among them; label `i + 1` is `classes[i]`.

    Raises:
        DefeatError: another kind of model, or another number of classes.
    """
    kind = next((detector for known, detector in WRAPPERS if isinstance(model, known)), None)
    if kind is None or not hasattr(getattr(model, "backbone", None), "fpn"):
        raise DefeatError(
            f"wrap: {type(model).__name__} is no Faster R-CNN, RetinaNet or FCOS of torchvision with an FPN; "
            "FeatureDetector makes a detector of any module"
        )
    if kind is FasterRCNNDetector:
        columns = model.roi_heads.box_predictor.cls_score.out_features
    else:
        columns = model.head.classification_head.num_classes
    if columns != len(classes) + 1:
        raise DefeatError(
            f"wrap: the model was built with num_classes={columns}, which is {counted(columns - 1, 'class')} and "
            f"background; {counted(len(classes), 'name was', 'names were')} given"
        )
    return kind(model, classes)


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
