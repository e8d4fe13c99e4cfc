"""What a detector is made of, as plain values: what detectors are built from, checkpoints tell and recipes set."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from defeat_cli.config.types import Count, Finite, Flag, Fraction, NonNegative, Positive, Whole

DETECTOR_FAMILIES = ("faster_rcnn", "retinanet", "fcos")
TORCHVISION_BUILDERS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
)
BACKBONES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet",
)


STRICT = ConfigDict(extra="forbid")
"""Unknown keys are refused; the field types refuse values of another kind."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Conventions:
    """Where detectors of other libraries compute differently from torchvision's. Checkpoint readers set these."""

    image_mean: Annotated[list[Finite], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: [0.485, 0.456, 0.406]
    )
    """RGB mean of pixels in [0, 1]."""
    image_std: Annotated[list[Positive], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: [0.229, 0.224, 0.225]
    )
    """RGB standard deviation of pixels in [0, 1]."""
    stride_in_1x1: Flag = False
    """A ResNet bottleneck strides in its first 1x1 convolution instead of the 3x3."""
    batch_norm_eps: NonNegative | None = None
    """Epsilon of the backbone's BatchNorm; null takes torchvision's own for that backbone (1e-5 in ResNets)."""
    roi_align_aligned: Flag = False
    """RoIAlign shifts boxes by half a pixel."""
    roi_align_sampling_ratio: Whole = 2
    """Samples a RoIAlign bin side; 0 adapts it to the box."""
    rounded_anchors: Flag = True
    """Anchor sides are rounded to whole pixels, as torchvision does."""
    anchor_order: Literal["ratios-first", "sizes-first"] = "ratios-first"
    """Which varies slowest among the anchors of one cell: torchvision goes through ratios first."""
    nominal_strides: Flag = False
    """Anchors are spaced by the level's nominal stride also where the padded image is no multiple of it."""
    p6_from: Literal["c5", "p5"] = "p5"
    """What RetinaNet's and FCOS's P6 is computed from."""
    p7_relu: Flag = True
    """A ReLU stands between P6 and P7."""
    clip_after_nms: Flag = False
    """RetinaNet's boxes are clipped to the image after non-maximum suppression instead of before."""
    clip_proposals: Flag = True
    """The RPN's boxes are clipped to the image; false keeps what lies outside."""
    clip_detections: Flag = True
    """Detections are clipped to the image."""
    smallest_box: Finite | None = None
    """Proposals (RetinaNet: detections) with a side of this many pixels or less are dropped before suppression; below 0
    keeps all. Null takes the library's own: almost 0.001 for torchvision's proposals, 0 for the others'."""
    suppression: Literal["hard", "linear", "gaussian"] = "hard"
    """What overlapping detections suffer: they are dropped, or (soft-NMS) their scores are lowered, at once above
    `nms_threshold` (linear) or gradually (gaussian)."""
    suppression_sigma: Positive = 0.5
    """Spread of the gaussian."""
    suppression_least_score: Fraction = 0.001
    """Detections whose score soft-NMS lowers below this are dropped."""
    suppression_across_classes: Flag = False
    """A detection suppresses those of other classes too."""
    keep_ratio: Flag = True
    """Images keep their ratio of sides; false stretches all to `long_side` x `short_side`."""
    channels: Literal["rgb", "bgr"] | None = None
    """Channel order that the weights of another library were trained on, with `image_mean`, `image_std` (both RGB) and
    `stride_in_1x1`, for a checkpoint that does not say; null takes what is usual for it. Once read, they take RGB."""
    edge_cases: Literal["torchvision", "mmdetection", "detectron2"] = "torchvision"
    """Whose rules hold where it seldom matters: regions on the edge of two levels, empty boxes, extreme deltas."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Architecture:
    """What a detector is made of. A native checkpoint carries its own."""

    detector: Literal[DETECTOR_FAMILIES + TORCHVISION_BUILDERS] = "faster_rcnn"  # type: ignore[valid-type]
    """A family, built from the keys below, or one of torchvision's builders, which leaves only `norm` and
    `frozen_stages` open."""
    backbone: Literal[BACKBONES] = "resnet50"  # type: ignore[valid-type]
    widths: Annotated[list[Count], Field(min_length=4, max_length=4)] | None = None
    """Channels of the four stages; `regnet` only."""
    depths: Annotated[list[Count], Field(min_length=4, max_length=4)] | None = None
    """Blocks of the four stages; `regnet` only, where null is one block each."""
    fpn_channels: Count = 256
    head_channels: Count = 1024
    """Width of Faster R-CNN's box head. One-stage heads are as wide as the FPN."""
    norm: Literal["frozen", "batch"] = "frozen"
    """Backbone BatchNorm: `frozen` statistics (right for pretrained weights, small batches) or trained."""
    frozen_stages: Annotated[int, Field(ge=0, le=5, strict=True)] = 0
    """Backbone stages that are not trained, counted from the stem (torchvision's usual choice is 2)."""
    anchor_sizes: list[list[Positive]] | None = None
    """Anchor sides in pixels, one list per FPN level; null takes the family's defaults."""
    anchor_ratios: Annotated[list[Positive], Field(min_length=1)] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    proposals: Count | None = None
    """Proposals kept per image by the RPN after suppression, at inference; null takes the detector's own, as for the
    thresholds and counts below (see `own_settings`)."""
    proposals_before_nms: Count | None = None
    """Proposals of each level that go into suppression, at inference; null takes as many as `proposals`."""
    proposal_nms_threshold: Fraction = 0.7
    """Overlap above which the RPN suppresses a proposal."""
    candidates_per_level: Count = 1000
    """Detections of each level that go into RetinaNet's and FCOS's suppression."""
    proposals_train: Count = 2000
    """Proposals kept in training, before and after suppression."""
    regions_per_image: Count = 512
    """Proposals sampled per image for the box head, and for head distillation from this detector as teacher."""
    score_threshold: Fraction | None = None
    nms_threshold: Fraction | None = None
    detections_per_image: Count | None = None
    conventions: Conventions = Conventions()

    def __post_init__(self) -> None:
        if self.backbone == "regnet" and self.detector in DETECTOR_FAMILIES:
            if self.widths is None:
                raise ValueError("widths is needed for backbone regnet, e.g. [32, 64, 128, 256]")
        elif self.widths is not None or self.depths is not None:
            raise ValueError(f"widths and depths are for backbone regnet only, not {self.backbone}")
        for name, value in own_settings(self.detector).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else


def _partial(settings: type) -> type:
    """The same settings as a mapping that may leave any of them out."""
    fields = get_type_hints(settings, include_extras=True)
    nested = {name: _partial(kind) for name, kind in fields.items() if kind is Conventions}
    partial = TypedDict(f"Some{settings.__name__}Settings", {**fields, **nested}, total=False)
    partial.__pydantic_config__ = STRICT
    return partial


SomeSettings = _partial(Architecture)
"""Settings that a user gives a trained detector; those that are not said are the checkpoint's own."""

STRUCTURE = ("detector", "backbone", "widths", "depths", "fpn_channels", "head_channels")
"""Settings that decide which weights there are: those of given weights cannot be changed."""

TRAINING = ("norm", "frozen_stages", "proposals_train", "regions_per_image")
"""Settings that training alone depends on."""

INFERENCE = (
    *(name for name in Architecture.__dataclass_fields__ if name not in (*STRUCTURE, *TRAINING, "conventions")),
    *(f"conventions.{name}" for name in Conventions.__dataclass_fields__),
)
"""Settings that decide what given weights detect, by dotted name: every one that is not named above."""

SIZES = ("short_side", "long_side")
"""What decides inference too, but is a setting of the data."""

USUAL = {"proposals": 1000, "score_threshold": 0.05, "nms_threshold": 0.5, "detections_per_image": 100}
OWN = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"proposals": 150},
    "retinanet_resnet50_fpn": {"detections_per_image": 300},
    "retinanet_resnet50_fpn_v2": {"detections_per_image": 300},
    "fcos_resnet50_fpn": {"score_threshold": 0.2, "nms_threshold": 0.6},
}
"""Where torchvision's builders set something else than `USUAL`."""

PLAIN_BUILDERS = {
    "faster_rcnn": "fasterrcnn_resnet50_fpn",
    "retinanet": "retinanet_resnet50_fpn",
    "fcos": "fcos_resnet50_fpn",
}
"""torchvision's builder of each family, with the settings that the family's class has there by default."""


def own_settings(detector: str) -> dict[str, Any]:
    """Thresholds and counts that a detector has where nobody says otherwise."""
    return USUAL | OWN.get(detector, {})


def own_sizes(detector: str) -> dict[str, int]:
    """Short and long side, in pixels, that torchvision resizes images to for a detector."""
    short_side, long_side = (320, 640) if detector == "fasterrcnn_mobilenet_v3_large_320_fpn" else (800, 1333)
    return {"short_side": short_side, "long_side": long_side}


def family(architecture: Architecture) -> str:
    """The family of a detector, those of torchvision's builders included."""
    name = architecture.detector.replace("fasterrcnn", "faster_rcnn")
    return next(family for family in DETECTOR_FAMILIES if name.startswith(family))


def backbone_name(architecture: Architecture) -> str:
    """The backbone of a detector, those of torchvision's builders included."""
    if architecture.detector not in TORCHVISION_BUILDERS:
        return architecture.backbone
    return "resnet50" if "resnet50" in architecture.detector else "mobilenet_v3_large"


def trains_batch_norm(architecture: Architecture) -> bool:
    """Whether a detector has batch normalisation whose statistics are trained."""
    if architecture.detector in TORCHVISION_BUILDERS:
        return architecture.detector == "fasterrcnn_resnet50_fpn_v2"
    return architecture.norm == "batch"


def structure(architecture: Architecture) -> dict[str, Any]:
    """The settings of `STRUCTURE`, the same for detectors whose weights have the same names and shapes."""
    detector = architecture.detector
    if detector in DETECTOR_FAMILIES:
        parts = {name: getattr(architecture, name) for name in STRUCTURE}
        if architecture.backbone == "regnet":
            parts["depths"] = architecture.depths or [1] * 4
        if detector != "faster_rcnn":
            del parts["head_channels"]
        return parts
    if detector in PLAIN_BUILDERS.values():
        return structure(Architecture(detector=family(architecture)))
    # The same detector, run on smaller images.
    return {"detector": detector.replace("_320", "")}


def without_effect(architecture: Architecture) -> set[str]:
    """Settings of `INFERENCE` that a detector does not have, by dotted name."""
    detector, name = architecture.detector, architecture.backbone
    built = detector in TORCHVISION_BUILDERS
    missing = set(NOT_IN_FAMILY[family(architecture)])
    if built:
        missing |= set(INFERENCE) - set(OPEN_IN_BUILDERS)
        name = detector
    if not any(bottleneck in name for bottleneck in ("resnet50", "resnet101", "resnet152", "resnext")):
        missing.add("conventions.stride_in_1x1")
    if architecture.conventions.suppression != "gaussian":
        missing.add("conventions.suppression_sigma")
    if architecture.conventions.suppression == "hard":
        missing.add("conventions.suppression_least_score")
    return missing | {"conventions.channels"}  # it has said all that it has to say once the weights are read


OF_PROPOSALS = (
    *("proposals", "proposals_before_nms", "proposal_nms_threshold"),
    *("conventions.clip_proposals", "conventions.roi_align_aligned", "conventions.roi_align_sampling_ratio"),
)
NOT_IN_FAMILY = {
    "faster_rcnn": (
        *("candidates_per_level", "conventions.p6_from", "conventions.p7_relu", "conventions.clip_after_nms"),
    ),
    "retinanet": OF_PROPOSALS,
    "fcos": (
        *OF_PROPOSALS,
        *("anchor_sizes", "anchor_ratios", "conventions.rounded_anchors", "conventions.anchor_order"),
        *("conventions.nominal_strides", "conventions.clip_after_nms", "conventions.edge_cases"),
        *("conventions.clip_detections", "conventions.smallest_box", "conventions.suppression"),
        *("conventions.suppression_sigma", "conventions.suppression_least_score"),
        "conventions.suppression_across_classes",
    ),
}
OPEN_IN_BUILDERS = (
    *("proposals", "proposals_before_nms", "proposal_nms_threshold", "candidates_per_level"),
    *("score_threshold", "nms_threshold", "detections_per_image"),
    *(f"conventions.{name}" for name in ("image_mean", "image_std", "batch_norm_eps", "stride_in_1x1", "keep_ratio")),
)
"""Settings of `INFERENCE` that the detectors of torchvision's builders have; the builder decides the others."""


def changed_settings(settings: Architecture | Conventions) -> dict[str, Any]:
    """The settings that are not at their default, nested, as a recipe would give them; a detector's kind always."""
    always = {"detector": settings.detector} if isinstance(settings, Architecture) else {}
    values, defaults = asdict(settings), asdict(type(settings)(**always))
    changed = always | {name: value for name, value in values.items() if value != defaults[name]}
    if "conventions" in changed:
        changed["conventions"] = changed_settings(settings.conventions)
    return changed
