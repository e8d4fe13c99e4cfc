"""What a detector is made of, as plain values: what detectors are built from, checkpoints tell and recipes set."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

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
    proposals: Count = 1000
    """Proposals kept per image by the RPN after suppression, at inference."""
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
    score_threshold: Fraction = 0.05
    nms_threshold: Fraction = 0.5
    detections_per_image: Count = 100
    conventions: Conventions = Conventions()

    def __post_init__(self) -> None:
        if self.backbone == "regnet" and self.detector in DETECTOR_FAMILIES:
            if self.widths is None:
                raise ValueError("widths is needed for backbone regnet, e.g. [32, 64, 128, 256]")
        elif self.widths is not None or self.depths is not None:
            raise ValueError(f"widths and depths are for backbone regnet only, not {self.backbone}")


def changed_settings(settings: Architecture | Conventions) -> dict[str, Any]:
    """The settings that are not at their default, nested, as a recipe would give them."""
    values, defaults = asdict(settings), asdict(type(settings)())
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    if "conventions" in changed:
        changed["conventions"] = changed_settings(settings.conventions)
    return changed
