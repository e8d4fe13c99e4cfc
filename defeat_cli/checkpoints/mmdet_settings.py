"""Every setting of mmdetection's that is understood, for Faster R-CNN and RetinaNet, with the library's own defaults.

Where the library has no default and only one value is supported, that value stands as the default. A class of 2.x and
3.x may be named with its package (`mmdet.FasterRCNN`), or as new base files name it, in full.
"""

# ruff: noqa: RUF012 - a model's defaults are validated, and so copied, for each instance

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from defeat_cli.checkpoints.configuration import Section, Sides, numbers, only
from defeat_cli.config.types import Count, Finite, Flag, Fraction, NonNegative, Positive, Whole

PACKAGES = ("mmdet", "mmcv", "mmengine", "torch")
"""Packages whose classes mean here what they mean without the package's name."""

ALIASES = {"BatchNorm2d": "BN", "BN2d": "BN", "SyncBatchNorm": "SyncBN"}


def short_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = value.split(".")
    name = parts[-1] if parts[0] in PACKAGES else value
    return ALIASES.get(name, name)


def named(*names: str) -> Any:
    """The type of a setting that names one of these classes."""
    return Annotated[only(*names), BeforeValidator(short_name)]


class Norm(Section):
    type: named("BN", "SyncBN") = "BN"
    eps: NonNegative = 1e-5
    without_effect = "requires_grad momentum"


class Backbone(Section):
    type: named("ResNet", "ResNeXt") = "ResNet"
    style: Literal["pytorch", "caffe"] = "pytorch"
    norm_cfg: Norm = {}
    in_channels: only(3) = 3
    stem_channels: only(None, 64) = None
    base_channels: only(64) = 64
    num_stages: only(4) = 4
    out_indices: only([0, 1, 2, 3]) = [0, 1, 2, 3]
    strides: only([1, 2, 2, 2]) = [1, 2, 2, 2]
    dilations: only([1, 1, 1, 1]) = [1, 1, 1, 1]
    deep_stem: only(False) = False
    avg_down: only(False) = False
    conv_cfg: only(None) = None
    dcn: only(None) = None
    plugins: only(None) = None
    without_effect = (
        "depth groups base_width frozen_stages norm_eval with_cp zero_init_residual pretrained init_cfg stage_with_dcn"
    )


class Neck(Section):
    """FPN from P2; from P3 with two more convolutions it is `RetinaNeck`."""

    type: named("FPN") = "FPN"
    num_outs: only(5) = 5
    end_level: only(-1, 3) = -1
    add_extra_convs: only(False) = False
    relu_before_extra_convs: Flag = False
    conv_cfg: only(None) = None
    norm_cfg: only(None) = None
    act_cfg: only(None) = None
    upsample_cfg: only({"mode": "nearest"}, {"mode": "nearest", "scale_factor": 2}) = {"mode": "nearest"}
    without_effect = "in_channels out_channels start_level no_norm_on_lateral init_cfg"


class RetinaNeck(Neck):
    add_extra_convs: only("on_input", "on_output", True) = False


class Coder(Section):
    """How deltas become boxes: they are times `target_stds` plus `target_means`."""

    type: named("DeltaXYWHBBoxCoder") = "DeltaXYWHBBoxCoder"
    target_means: numbers(4) = [0.0, 0.0, 0.0, 0.0]
    target_stds: numbers(4, Positive) = [1.0, 1.0, 1.0, 1.0]
    clip_border: Flag = True
    add_ctr_clamp: only(False) = False
    without_effect = "ctr_clamp use_box_type"


def _square(value: Any) -> Any:
    """Strides given as pairs of equal numbers, as numbers."""
    if not isinstance(value, list | tuple):
        return value
    return [side[0] if isinstance(side, list | tuple) and len({*map(repr, side)}) == 1 else side for side in value]


class Anchors(Section):
    """An anchor's side is its level's base, which is the stride where none is given, times a scale."""

    type: named("AnchorGenerator") = "AnchorGenerator"
    strides: Annotated[only([4, 8, 16, 32, 64]), BeforeValidator(_square)] = [4, 8, 16, 32, 64]
    ratios: Sides
    scales: Sides | None = None
    octave_base_scale: Positive | None = None
    scales_per_octave: Count | None = None
    base_sizes: numbers(5, Positive) | None = None
    scale_major: Flag = True
    centers: only(None) = None
    center_offset: only(0.0) = 0.0
    without_effect = "use_box_type"

    @model_validator(mode="after")
    def _scales_in_one_way(self) -> Anchors:
        octave = (self.octave_base_scale, self.scales_per_octave)
        if (self.scales is None) != all(octave) or (self.scales is not None and any(octave)):
            raise ValueError("expected either scales, or octave_base_scale with scales_per_octave")
        return self

    @property
    def sizes(self) -> list[list[float]]:
        """Anchor sides of each level, pixels."""
        scales = self.scales
        if scales is None:
            count = self.scales_per_octave
            scales = [self.octave_base_scale * 2 ** (step / count) for step in range(count)]
        return [[float(base * scale) for scale in scales] for base in self.base_sizes or self.strides]


class RetinaAnchors(Anchors):
    strides: Annotated[only([8, 16, 32, 64, 128]), BeforeValidator(_square)] = [8, 16, 32, 64, 128]


class SigmoidLoss(Section):
    """Only what the classifier's outputs mean; the rest of a loss matters in training."""

    model_config = {"extra": "ignore"}
    type: named("CrossEntropyLoss", "FocalLoss", "GHMC")
    use_sigmoid: only(True) = False


class SoftmaxLoss(Section):
    model_config = {"extra": "ignore"}
    type: named("CrossEntropyLoss")
    use_sigmoid: only(False) = False


class RPN(Section):
    type: named("RPNHead") = "RPNHead"
    anchor_generator: Anchors = {"scales": [8, 16, 32], "ratios": [0.5, 1, 2]}
    bbox_coder: Coder = {}
    loss_cls: SigmoidLoss = {"type": "CrossEntropyLoss", "use_sigmoid": True}
    num_classes: only(1) = 1
    without_effect = "in_channels feat_channels num_convs loss_bbox reg_decoded_bbox init_cfg"


class RoILayer(Section):
    type: named("RoIAlign") = "RoIAlign"
    output_size: only(7, [7, 7]) = Field(7, validation_alias=AliasChoices("output_size", "out_size"))
    sampling_ratio: Whole = Field(0, validation_alias=AliasChoices("sampling_ratio", "sample_num"))
    aligned: Flag = True
    pool_mode: only("avg") = "avg"
    without_effect = "use_torchvision"


class RoIExtractor(Section):
    type: named("SingleRoIExtractor") = "SingleRoIExtractor"
    roi_layer: RoILayer = {}
    featmap_strides: only([4, 8, 16, 32]) = [4, 8, 16, 32]
    finest_scale: only(56) = 56
    without_effect = "out_channels init_cfg"


class Linear(Section):
    type: named("Linear") = "Linear"


class BoxHead(Section):
    type: named("Shared2FCBBoxHead", "ConvFCBBoxHead") = "Shared2FCBBoxHead"
    bbox_coder: Coder = {"target_stds": [0.1, 0.1, 0.2, 0.2]}
    loss_cls: SoftmaxLoss = {"type": "CrossEntropyLoss"}
    roi_feat_size: only(7, [7, 7]) = 7
    with_avg_pool: only(False) = False
    with_cls: only(True) = True
    with_reg: only(True) = True
    cls_predictor_cfg: Linear = {}
    reg_predictor_cfg: Linear = {}
    predict_box_type: only("hbox") = "hbox"
    conv_cfg: only(None) = None
    without_effect = (
        "in_channels fc_out_channels conv_out_channels num_classes reg_class_agnostic reg_decoded_bbox norm_cfg "
        "num_shared_convs num_shared_fcs num_cls_convs num_cls_fcs num_reg_convs num_reg_fcs loss_bbox init_cfg"
    )


class RoIHead(Section):
    """The head of Faster R-CNN; Dynamic R-CNN and PISA change its training only."""

    type: named("StandardRoIHead", "DynamicRoIHead", "PISARoIHead") = "StandardRoIHead"
    bbox_roi_extractor: RoIExtractor = {}
    bbox_head: BoxHead = {}
    shared_head: only(None) = None
    mask_roi_extractor: only(None) = None
    mask_head: only(None) = None
    without_effect = "train_cfg test_cfg pretrained init_cfg"


class RetinaHead(Section):
    """RetinaNet's head; FreeAnchor and PISA change its training only."""

    type: named("RetinaHead", "FreeAnchorRetinaHead", "PISARetinaHead") = "RetinaHead"
    anchor_generator: RetinaAnchors = {"octave_base_scale": 4, "scales_per_octave": 3, "ratios": [0.5, 1, 2]}
    bbox_coder: Coder = {}
    loss_cls: SigmoidLoss = {"type": "CrossEntropyLoss", "use_sigmoid": True}
    conv_cfg: only(None) = None
    norm_cfg: only(None) = None
    without_effect = (
        "num_classes in_channels stacked_convs feat_channels loss_bbox reg_decoded_bbox init_cfg train_cfg test_cfg"
    )


class Suppression(Section):
    """Non-maximum suppression, which drops boxes (`nms`) or lowers their scores (`soft_nms`)."""

    type: named("nms", "soft_nms") = "nms"
    iou_threshold: Fraction = Field(0.3, validation_alias=AliasChoices("iou_threshold", "iou_thr"))
    method: Literal["linear", "gaussian"] = "linear"
    sigma: Positive = 0.5
    min_score: Fraction = 1e-3
    class_agnostic: Flag = False
    offset: only(0) = 0
    score_threshold: only(0) = 0
    max_num: only(-1) = -1
    without_effect = "split_thr"

    @model_validator(mode="after")
    def _settings_of_its_kind(self) -> Suppression:
        soft = self.model_fields_set & {"method", "sigma", "min_score"}
        if self.type == "nms" and (soft or "iou_threshold" not in self.model_fields_set):
            raise ValueError(f"nms takes iou_threshold, and no {', '.join(soft) or 'default of it is known'}")
        return self


class LevelSuppression(Suppression):
    type: named("nms") = "nms"
    class_agnostic: only(False) = False


class ProposalTest(Section):
    """`nms_pre` of zero or less keeps all; `min_bbox_size` below 0 keeps boxes without area too."""

    nms_pre: Annotated[int, Field(strict=True)] = -1
    max_per_img: Count = Field(validation_alias=AliasChoices("max_per_img", "max_num"))
    nms: LevelSuppression
    min_bbox_size: Finite = -1
    nms_post: Count | None = None
    nms_across_levels: only(False) = False

    @model_validator(mode="before")
    @classmethod
    def _threshold_of_old(cls, values: Any) -> Any:
        """2.0 to 2.6 had the threshold alone."""
        if not isinstance(values, Mapping) or "nms_thr" not in values or "nms" in values:
            return values
        return {**{k: v for k, v in values.items() if k != "nms_thr"}, "nms": {"iou_threshold": values["nms_thr"]}}

    @model_validator(mode="after")
    def _same_count_by_both_names(self) -> ProposalTest:
        if self.nms_post not in (None, self.max_per_img):
            raise ValueError(f"nms_post is {self.nms_post}, max_per_img {self.max_per_img}: expected the same")
        return self


class BoxTest(Section):
    score_thr: Fraction
    max_per_img: Count
    nms: Suppression
    without_effect = "mask_thr_binary"


class TwoStageTest(Section):
    rpn: ProposalTest
    rcnn: BoxTest


class OneStageTest(BoxTest):
    nms_pre: Count
    min_bbox_size: Annotated[Finite, Field(le=0)] = -1
    without_effect = "deploy_nms_pre"


class FasterRCNN(Section):
    type: named("FasterRCNN") = "FasterRCNN"
    backbone: Backbone = {}
    neck: Neck = {}
    rpn_head: RPN = {}
    roi_head: RoIHead = {}
    test_cfg: TwoStageTest
    without_effect = "data_preprocessor train_cfg pretrained init_cfg"


class RetinaNet(Section):
    type: named("RetinaNet") = "RetinaNet"
    backbone: Backbone = {}
    neck: RetinaNeck
    bbox_head: RetinaHead = {}
    test_cfg: OneStageTest
    without_effect = "data_preprocessor train_cfg pretrained init_cfg"
