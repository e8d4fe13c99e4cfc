"""Plain torchvision state dicts: bare, or under `model` or `state_dict`; and torchvision's own COCO weights by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from defeat_cli.checkpoints.weights import StateDict, Weights, is_state_dict
from defeat_cli.config.architecture import TORCHVISION_BUILDERS, Architecture, Conventions
from defeat_cli.config.schema import nearest
from defeat_cli.errors import CheckpointError

WRAPPERS = ("model", "state_dict", "model_state_dict")
"""Keys under which training scripts keep the state dict; torchvision's references use `model`."""

KEYS = [
    (r"module\.(.+)", r"\1"),  # DistributedDataParallel
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
]
"""Names of torchvision before 0.13, as in its published files, to today's. Applied in turn, each where it fits."""

RETINANET_KEYS = [
    (rf"(head\.(?:classification|regression)_head\.conv)\.{2 * i}\.(weight|bias)", rf"\1.{i}.0.\2") for i in range(4)
]
"""The same for RetinaNet alone: FCOS has such names too, and keeps them."""

WITHOUT_EPSILON = ("fasterrcnn_resnet50_fpn_coco-258fb6c6", "retinanet_resnet50_fpn_coco-eeacb38b")
"""Published files whose weights torchvision runs with a BatchNorm epsilon of 0."""

RESNETS = {
    # blocks of the four stages, bottleneck?, groups, width of a group in the first stage
    ((2, 2, 2, 2), False, 1, 64): "resnet18",
    ((3, 4, 6, 3), False, 1, 64): "resnet34",
    ((3, 4, 6, 3), True, 1, 64): "resnet50",
    ((3, 4, 23, 3), True, 1, 64): "resnet101",
    ((3, 8, 36, 3), True, 1, 64): "resnet152",
    ((3, 4, 6, 3), True, 32, 4): "resnext50_32x4d",
    ((3, 4, 23, 3), True, 32, 4): "resnext101_32x4d",
    ((3, 4, 23, 3), True, 32, 8): "resnext101_32x8d",
    ((3, 4, 23, 3), True, 64, 4): "resnext101_64x4d",
}

GIVE_A_RECIPE = "say what it is with teacher.architecture (or student) in a recipe"


def coco_classes(num_classes: int) -> list[str] | None:
    """COCO's names for the two usual counts: 90 (torchvision: label = COCO id, `N/A` in its gaps) and 80; else None."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    return {len(names): names, 80: [name for name in names if name != "N/A"]}.get(num_classes)


def matches(content: Any) -> bool:
    state_dict = _unwrapped(content)
    return state_dict is not None and _head_key(state_dict) is not None


def to_weights(content: Any, origin: str, architecture: Architecture | None = None) -> Weights:
    """The detector in a torchvision state dict.

    Args:
        architecture: what it is; None reads it from keys and shapes.

    Raises:
        CheckpointError: it is not known what the detector is made of.
    """
    raw = _unwrapped(content)
    notes = ["a torchvision state dict"]
    if any(key.startswith("module.") for key in raw):
        notes.append("the prefix `module.` of a distributed training was taken off")
    state_dict = renamed(raw)
    if architecture is None:
        try:
            architecture = infer_architecture(state_dict, origin)
        except KeyError as error:
            raise CheckpointError(
                f"{origin}: a torchvision detector, but not one of ours: it has no {error.args[0]}; {GIVE_A_RECIPE}"
            ) from None
        notes.append(f"read from its keys and shapes: {_spoken(architecture)}")
    if Path(origin).name.startswith(WITHOUT_EPSILON):
        architecture = without_epsilon(architecture)
        notes.append("torchvision's published file: BatchNorm epsilon is 0, as torchvision runs it")
    num_classes = count_classes(state_dict)
    classes = coco_classes(num_classes)
    if classes:
        notes.append(f"{num_classes} classes without names in the file: taken to be COCO's")
    return Weights("torchvision", state_dict, architecture, num_classes, classes, notes=notes)


def download(name: str) -> Weights:
    """torchvision's COCO weights of one of its builders.

    Raises:
        CheckpointError: no such builder, or no network to fetch them.
    """
    if name not in TORCHVISION_BUILDERS:
        known = ", ".join(TORCHVISION_BUILDERS)
        raise CheckpointError(
            f"torchvision:{name}: no such detector{nearest(name, TORCHVISION_BUILDERS)}. Known: {known}"
        )
    weights = get_model_weights(name).COCO_V1
    try:
        raw = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"torchvision:{name}: its weights could not be fetched from {weights.url}: {error}. "
            "Fetch the file where there is a network and give its path instead"
        ) from None
    state_dict = renamed(raw)
    architecture = Architecture(detector=name)
    if Path(weights.url).name.startswith(WITHOUT_EPSILON):
        architecture = without_epsilon(architecture)
    num_classes = count_classes(state_dict)
    short_side, long_side = (320, 640) if "320" in name else (800, 1333)
    return Weights(
        "torchvision",
        state_dict,
        architecture,
        num_classes,
        coco_classes(num_classes),
        short_side,
        long_side,
        notes=[f"torchvision's COCO weights of {name}"],
    )


def without_epsilon(architecture: Architecture) -> Architecture:
    """The same, with the BatchNorm epsilon of 0 that torchvision sets for its oldest weights."""
    return replace(architecture, conventions=replace(architecture.conventions, batch_norm_eps=0.0))


def _unwrapped(content: Any) -> StateDict | None:
    if is_state_dict(content):
        return content
    if isinstance(content, Mapping):
        return next((content[key] for key in WRAPPERS if is_state_dict(content.get(key))), None)
    return None


def renamed(state_dict: StateDict) -> StateDict:
    """The same tensors by today's names."""
    is_fcos = any(key.endswith("head.regression_head.bbox_ctrness.weight") for key in state_dict)
    result = {}
    for key, value in state_dict.items():
        for pattern, replacement in KEYS if is_fcos else KEYS + RETINANET_KEYS:
            match = re.fullmatch(pattern, key)
            key = match.expand(replacement) if match else key
        result[key] = value
    return result


def _head_key(state_dict: StateDict) -> str | None:
    """The name of the classifier's bias, by which a torchvision detector is known."""
    names = ("roi_heads.box_predictor.cls_score.bias", "head.classification_head.cls_logits.bias")
    return next((key for key in state_dict if key.removeprefix("module.") in names and _has_fpn(state_dict)), None)


def _has_fpn(state_dict: StateDict) -> bool:
    return any(key.removeprefix("module.").startswith("backbone.fpn.inner_blocks.") for key in state_dict)


def count_classes(state_dict: StateDict) -> int:
    """K without background, for which torchvision's RetinaNet and FCOS have a column too, though they never use it."""
    outputs = len(state_dict[_head_key(state_dict)])
    regression = state_dict.get("head.regression_head.bbox_reg.bias")
    anchors = len(regression) // 4 if regression is not None else 1
    return outputs // anchors - 1


def infer_architecture(state_dict: StateDict, origin: str) -> Architecture:
    """What a torchvision detector is made of, from the names and shapes of its weights.

    Raises:
        CheckpointError: names the part that is not recognised.
    """
    fpn = state_dict["backbone.fpn.inner_blocks.0.0.weight"].shape[0]
    backbone = _backbone(state_dict, origin)
    counted = any(key.startswith("backbone.body.") and key.endswith("num_batches_tracked") for key in state_dict)
    norm = "batch" if counted else "frozen"
    parts = {**backbone, "fpn_channels": fpn, "norm": norm}
    if "head.regression_head.bbox_ctrness.weight" in state_dict:
        return Architecture(detector="fcos", **parts, **_p6(state_dict))
    if "head.regression_head.bbox_reg.weight" in state_dict:
        if "head.classification_head.conv.0.1.weight" in state_dict:
            return Architecture(detector="retinanet_resnet50_fpn_v2", norm=norm)
        _expect_anchors(len(state_dict["head.regression_head.bbox_reg.bias"]) // 4, 9, origin)
        return Architecture(detector="retinanet", **parts, **_p6(state_dict))
    anchors = len(state_dict["rpn.head.cls_logits.bias"])
    if "roi_heads.box_head.0.0.weight" in state_dict:
        return Architecture(detector="fasterrcnn_resnet50_fpn_v2", norm=norm)
    if parts["backbone"] == "mobilenet_v3_large" and anchors == 15 and fpn == 256:
        return Architecture(detector="fasterrcnn_mobilenet_v3_large_fpn", norm=norm)
    _expect_anchors(anchors, 3, origin)
    head = state_dict["roi_heads.box_head.fc7.weight"].shape[0]
    return Architecture(detector="faster_rcnn", **parts, head_channels=head)


def _expect_anchors(found: int, usual: int, origin: str) -> None:
    if found != usual:
        raise CheckpointError(
            f"{origin}: {found} anchors a cell, not the usual {usual}: their sizes are not in the file; {GIVE_A_RECIPE}"
        )


def _p6(state_dict: StateDict) -> dict[str, Any]:
    """P6 comes from P5 where it takes as many channels as the FPN has: the rule of torchvision's own LastLevelP6P7."""
    outputs, inputs = state_dict["backbone.fpn.extra_blocks.p6.weight"].shape[:2]
    return {"conventions": Conventions(p6_from="p5" if inputs == outputs else "c5")}


def _backbone(state_dict: StateDict, origin: str) -> dict[str, Any]:
    body = {
        key.removeprefix("backbone.body."): value
        for key, value in state_dict.items()
        if key.startswith("backbone.body.")
    }
    if "layer1.0.conv1.weight" in body:
        return {"backbone": resnet_name(body, origin)}
    if "block1.block1-0.f.a.0.weight" in body:
        blocks = [
            [key for key in body if re.fullmatch(rf"block{stage}\..*f\.c\.0\.weight", key)] for stage in range(1, 5)
        ]
        widths = [body[keys[0]].shape[0] for keys in blocks]
        return {"backbone": "regnet", "widths": widths, "depths": [len(keys) for keys in blocks]}
    if "1.conv.0.0.weight" in body:
        return {"backbone": "mobilenet_v2"}
    if "1.block.0.0.weight" in body:
        # The first block that widens its input does so to 64 channels in the large one, to 72 in the small one.
        return {"backbone": "mobilenet_v3_large" if body["2.block.0.0.weight"].shape[0] == 64 else "mobilenet_v3_small"}
    raise CheckpointError(f"{origin}: a torchvision detector with a backbone that is not recognised; {GIVE_A_RECIPE}")


def resnet_name(body: StateDict, origin: str) -> str:
    """Which ResNet has these weights, named as in torchvision (`layer1.0.conv1.weight`, …).

    Raises:
        CheckpointError: none that we have.
    """
    stages = [{int(key.split(".")[1]) for key in body if key.startswith(f"layer{stage}.")} for stage in range(1, 5)]
    blocks = tuple(len(indices) for indices in stages)
    bottleneck = "layer1.0.conv3.weight" in body
    width, inputs = body["layer1.0.conv2.weight"].shape[:2]
    groups = width // inputs
    name = RESNETS.get((blocks, bottleneck, groups, width // groups))
    if name is None:
        kind = "bottleneck" if bottleneck else "basic"
        found = f"{'-'.join(map(str, blocks))} {kind} blocks, {groups} groups of width {width // groups}"
        raise CheckpointError(f"{origin}: a ResNet of {found} is none of {', '.join(RESNETS.values())}")
    return name


def _spoken(architecture: Architecture) -> str:
    if architecture.detector in TORCHVISION_BUILDERS:
        return f"torchvision's {architecture.detector}"
    return f"{architecture.detector} on {architecture.backbone}, FPN of {architecture.fpn_channels} channels"
