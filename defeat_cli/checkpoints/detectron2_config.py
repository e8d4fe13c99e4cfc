"""The `config.yaml` that detectron2 leaves beside its checkpoints: every setting of it that is understood.

A file that leaves settings out means detectron2's defaults, whether they are supported or not. Only plain YAML is read;
nothing in it is run.
"""

# ruff: noqa: RUF012 - a model's defaults are validated, and so copied, for each instance

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from defeat_cli.checkpoints.configuration import Section, Sides, numbers, only, read_section
from defeat_cli.config.types import Count, Finite, Flag, Fraction, Positive, Whole
from defeat_cli.errors import CheckpointError

FILE = "config.yaml"


class Backbone(Section):
    NAME: only("build_resnet_fpn_backbone") = "build_resnet_backbone"
    without_effect = "FREEZE_AT"


class RetinaBackbone(Backbone):
    NAME: only("build_retinanet_resnet_fpn_backbone") = "build_resnet_backbone"


class ResNets(Section):
    STRIDE_IN_1X1: Flag = True
    NORM: only("FrozenBN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN") = "FrozenBN"
    STEM_OUT_CHANNELS: only(64) = 64
    RES5_DILATION: only(1) = 1
    DEFORM_ON_PER_STAGE: only([False] * 4) = [False] * 4
    without_effect = (
        "DEPTH OUT_FEATURES NUM_GROUPS WIDTH_PER_GROUP RES2_OUT_CHANNELS DEFORM_MODULATED DEFORM_NUM_GROUPS"
    )


class Neck(Section):
    IN_FEATURES: only(["res2", "res3", "res4", "res5"]) = []
    NORM: only("") = ""
    FUSE_TYPE: only("sum") = "sum"
    without_effect = "OUT_CHANNELS"


class RetinaNeck(Neck):
    IN_FEATURES: only(["res3", "res4", "res5"]) = []


class Anchors(Section):
    """One list of sizes, or of ratios, stands for all five levels."""

    NAME: only("DefaultAnchorGenerator") = "DefaultAnchorGenerator"
    SIZES: Annotated[list[Sides], Field(min_length=1)] = [[32, 64, 128, 256, 512]]
    ASPECT_RATIOS: Annotated[list[Sides], Field(min_length=1)] = [[0.5, 1.0, 2.0]]
    OFFSET: only(0.0) = 0.0
    without_effect = "ANGLES"

    @model_validator(mode="after")
    def _for_five_levels(self) -> Anchors:
        if len(self.SIZES) not in (1, 5) or len({len(level) for level in self.SIZES}) != 1:
            raise ValueError("expected SIZES of one or five levels, as many sizes in each")
        if any(ratios != self.ASPECT_RATIOS[0] for ratios in self.ASPECT_RATIOS):
            raise ValueError("expected the same ASPECT_RATIOS for all levels")
        return self

    @property
    def sizes(self) -> list[list[float]]:
        return self.SIZES if len(self.SIZES) == 5 else self.SIZES * 5


class Proposals(Section):
    NAME: only("RPN") = "RPN"
    MIN_SIZE: Finite = 0


class ProposalNetwork(Section):
    HEAD_NAME: only("StandardRPNHead") = "StandardRPNHead"
    IN_FEATURES: only(["p2", "p3", "p4", "p5", "p6"]) = ["res4"]
    BBOX_REG_WEIGHTS: numbers(4, Positive) = [1.0, 1.0, 1.0, 1.0]
    PRE_NMS_TOPK_TEST: Count = 6000
    POST_NMS_TOPK_TEST: Count = 1000
    NMS_THRESH: Fraction = 0.7
    without_effect = (
        "BOUNDARY_THRESH IOU_THRESHOLDS IOU_LABELS BATCH_SIZE_PER_IMAGE POSITIVE_FRACTION BBOX_REG_LOSS_TYPE "
        "BBOX_REG_LOSS_WEIGHT SMOOTH_L1_BETA LOSS_WEIGHT PRE_NMS_TOPK_TRAIN POST_NMS_TOPK_TRAIN CONV_DIMS"
    )


class RoIHeads(Section):
    NAME: only("StandardROIHeads") = "Res5ROIHeads"
    IN_FEATURES: only(["p2", "p3", "p4", "p5"]) = ["res4"]
    SCORE_THRESH_TEST: Fraction = 0.05
    NMS_THRESH_TEST: Fraction = 0.5
    without_effect = "NUM_CLASSES IOU_THRESHOLDS IOU_LABELS BATCH_SIZE_PER_IMAGE POSITIVE_FRACTION PROPOSAL_APPEND_GT"


class BoxHead(Section):
    NAME: only("FastRCNNConvFCHead") = ""
    POOLER_TYPE: Literal["ROIAlignV2", "ROIAlign"] = "ROIAlignV2"
    POOLER_RESOLUTION: only(7) = 14
    POOLER_SAMPLING_RATIO: Whole = 0
    BBOX_REG_WEIGHTS: numbers(4, Positive) = [10.0, 10.0, 5.0, 5.0]
    NUM_FC: only(2) = 0
    NUM_CONV: only(0) = 0
    USE_SIGMOID_CE: only(False) = False
    without_effect = (
        "BBOX_REG_LOSS_TYPE BBOX_REG_LOSS_WEIGHT SMOOTH_L1_BETA FC_DIM CONV_DIM NORM CLS_AGNOSTIC_BBOX_REG "
        "TRAIN_ON_PRED_BOXES USE_FED_LOSS FED_LOSS_FREQ_WEIGHT_POWER FED_LOSS_NUM_CLASSES"
    )


class RetinaHead(Section):
    IN_FEATURES: only(["p3", "p4", "p5", "p6", "p7"]) = ["p3", "p4", "p5", "p6", "p7"]
    BBOX_REG_WEIGHTS: numbers(4, Positive) = [1.0, 1.0, 1.0, 1.0]
    SCORE_THRESH_TEST: Fraction = 0.05
    TOPK_CANDIDATES_TEST: Count = 1000
    NMS_THRESH_TEST: Fraction = 0.5
    NORM: only("") = ""
    without_effect = (
        "NUM_CLASSES NUM_CONVS IOU_THRESHOLDS IOU_LABELS PRIOR_PROB FOCAL_LOSS_GAMMA FOCAL_LOSS_ALPHA "
        "SMOOTH_L1_LOSS_BETA BBOX_REG_LOSS_TYPE"
    )


OTHER_PARTS = (
    "WEIGHTS DEVICE ROI_BOX_CASCADE_HEAD ROI_MASK_HEAD ROI_KEYPOINT_HEAD SEM_SEG_HEAD PANOPTIC_FPN KEYPOINT_ON MASK_ON "
)
"""Parts of a model that would show in the weights."""


class TwoStage(Section):
    META_ARCHITECTURE: only("GeneralizedRCNN") = "GeneralizedRCNN"
    PIXEL_MEAN: numbers(3) = [103.53, 116.28, 123.675]
    PIXEL_STD: numbers(3, Positive) = [1.0, 1.0, 1.0]
    LOAD_PROPOSALS: only(False) = False
    BACKBONE: Backbone = {}
    RESNETS: ResNets = {}
    FPN: Neck = {}
    ANCHOR_GENERATOR: Anchors = {}
    PROPOSAL_GENERATOR: Proposals = {}
    RPN: ProposalNetwork = {}
    ROI_HEADS: RoIHeads = {}
    ROI_BOX_HEAD: BoxHead = {}
    without_effect = OTHER_PARTS + "RETINANET"


class OneStage(Section):
    META_ARCHITECTURE: only("RetinaNet") = "GeneralizedRCNN"
    PIXEL_MEAN: numbers(3) = [103.53, 116.28, 123.675]
    PIXEL_STD: numbers(3, Positive) = [1.0, 1.0, 1.0]
    BACKBONE: RetinaBackbone = {}
    RESNETS: ResNets = {}
    FPN: RetinaNeck = {}
    ANCHOR_GENERATOR: Anchors = {}
    RETINANET: RetinaHead = {}
    without_effect = OTHER_PARTS + "LOAD_PROPOSALS PROPOSAL_GENERATOR RPN ROI_HEADS ROI_BOX_HEAD"


class Input(Section):
    FORMAT: Literal["BGR", "RGB"] = "BGR"
    MIN_SIZE_TEST: Count = 800
    MAX_SIZE_TEST: Count = 1333
    without_effect = "MIN_SIZE_TRAIN MIN_SIZE_TRAIN_SAMPLING MAX_SIZE_TRAIN RANDOM_FLIP CROP MASK_FORMAT"


class Test(Section):
    DETECTIONS_PER_IMAGE: Count = 100
    without_effect = "EXPECTED_RESULTS EVAL_PERIOD KEYPOINT_OKS_SIGMAS AUG PRECISE_BN"


class TwoStageConfig(Section):
    MODEL: TwoStage
    INPUT: Input = {}
    TEST: Test = {}
    without_effect = (
        "VERSION DATASETS DATALOADER SOLVER OUTPUT_DIR SEED CUDNN_BENCHMARK VIS_PERIOD GLOBAL FLOAT32_PRECISION"
    )


class OneStageConfig(TwoStageConfig):
    MODEL: OneStage


def find(checkpoint: Path) -> tuple[Path, Mapping[str, Any] | None] | None:
    """The `config.yaml` beside a checkpoint, and what is in it: None where it is no configuration of detectron2's.

    Raises:
        CheckpointError: it cannot be read, or takes the rest of its settings from another file.
    """
    path = checkpoint.parent / FILE
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise CheckpointError(
            f"{path}: beside the checkpoint, but cannot be read{where}: expected plain YAML, as detectron2 writes it "
            "into its output folder. Mend it, or move it away to take detectron2's defaults"
        ) from None
    if not isinstance(content, Mapping) or not {"MODEL", "_BASE_", "model"} & content.keys():
        return path, None
    if "MODEL" not in content or "_BASE_" in content:
        kind = "takes settings from another file (_BASE_)" if "_BASE_" in content else "is a LazyConfig"
        raise CheckpointError(
            f"{path}: beside the checkpoint, but {kind}: expected the whole configuration with its MODEL section, as "
            "detectron2 writes it into its output folder"
        )
    return path, plain(content)


def plain(value: Any) -> Any:
    """YAML's values, where detectron2 takes a text like `(1, 2)` for a tuple."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, str) and value.startswith(("(", "[")):
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return value
    return value


def read(content: Mapping[str, Any], two_stage: bool, origin: str) -> TwoStageConfig | OneStageConfig:
    """The settings of a configuration.

    Raises:
        CheckpointError: names those that are not understood.
    """
    try:
        return read_section(TwoStageConfig if two_stage else OneStageConfig, content, "")
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: a detector that cannot be represented here:\n  {error}") from None
