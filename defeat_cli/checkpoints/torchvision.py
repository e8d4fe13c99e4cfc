"""Plain torchvision state dicts: bare, or under `model` or `state_dict`; and torchvision's own COCO weights by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from defeat_cli.checkpoints.meaning import meaning_beside, meaning_of
from defeat_cli.checkpoints.weights import StateDict, Weights, is_state_dict
from defeat_cli.config.architecture import (
    PLAIN_BUILDERS,
    TORCHVISION_BUILDERS,
    Architecture,
    Conventions,
    own_settings,
    own_sizes,
    structure,
)
from defeat_cli.config.schema import nearest
from defeat_cli.errors import CheckpointError
from defeat_cli.text import counted

WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict", "model_state_dict")
"""Keys under which training scripts keep the state dict, a moving average's first: that is what they evaluate."""

HEADS = ("roi_heads.box_predictor.cls_score.bias", "head.classification_head.cls_logits.bias")
"""The classifier's bias, by which a torchvision detector is known."""

COMPILED = "_orig_mod."
"""What torch.compile puts before the names of what it has compiled."""

KEYS = [
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

SAY_ANCHORS = (
    "say them with anchor_sizes and anchor_ratios (--set student.anchor_sizes=…, teacher.architecture.anchor_sizes)"
)


def coco_classes(num_classes: int) -> list[str] | None:
    """COCO's names for the two usual counts: 90 (torchvision: label = COCO id, `N/A` in its gaps) and 80; else None."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    return {len(names): names, 80: [name for name in names if name != "N/A"]}.get(num_classes)


def matches(content: Any) -> bool:
    return any(_prefixes(state_dict) for _, state_dict in _state_dicts(content))


def to_weights(content: Any, origin: str, architecture: Architecture | None = None) -> Weights:
    """The detector in a torchvision state dict.

    What it is comes from the state dict itself where it says so (`meaning`), else from a recipe beside the file that
    fits, else from keys and shapes, with the settings that torchvision's builder of that family has.

    Args:
        architecture: what the caller says of it; needed only for anchors, which keys and shapes do not tell.

    Raises:
        CheckpointError: it is not known what the detector is made of.
    """
    raw, state_dict, notes = _detector_in(content, origin)
    num_classes = count_classes(state_dict)
    meaning = meaning_of(raw, origin)
    made_of = meaning.architecture if meaning else _inferred(state_dict, origin)

    def fits(other: Architecture) -> bool:
        return structure(other) == structure(made_of) and _anchors(other) in (None, _anchors_in(state_dict))

    beside, recipe, more = meaning_beside(Path(origin), fits)
    stated = meaning or beside
    if meaning is None:
        notes += more
    if stated is None:
        notes.append(f"read from its keys and shapes: {_spoken(made_of)}")
        if _published(origin, made_of, num_classes):
            made_of = without_epsilon(made_of)
            notes.append("torchvision's published file: BatchNorm epsilon is 0, as torchvision runs it")
        _require_known_anchors(state_dict, made_of, architecture, origin)
    classes = stated.classes if stated else None
    return Weights(
        "torchvision",
        state_dict,
        stated.architecture if stated else made_of,
        num_classes,
        coco_classes(num_classes) if classes is None else classes,
        stated.short_side if stated else None,
        stated.long_side if stated else None,
        notes,
        []
        if classes or not coco_classes(num_classes)
        else [f"{counted(num_classes, 'class')} without names: taken to be COCO's"],
        stated=stated is not None,
        recipe=recipe,
    )


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
    return Weights(
        "torchvision",
        state_dict,
        architecture,
        num_classes,
        coco_classes(num_classes),
        **own_sizes(name),
        notes=[f"torchvision's COCO weights of {name}"],
    )


def without_epsilon(architecture: Architecture) -> Architecture:
    """The same, with the BatchNorm epsilon of 0 that torchvision sets for its oldest weights."""
    return replace(architecture, conventions=replace(architecture.conventions, batch_norm_eps=0.0))


def _published(origin: str, architecture: Architecture, num_classes: int) -> bool:
    """Whether a file is one of those that torchvision published first, whatever its name is now.

    torchvision's files are named by the beginning of their SHA-256.
    """
    if num_classes != 90 or architecture.backbone != "resnet50":
        return False
    if Path(origin).name.startswith(WITHOUT_EPSILON):
        return True
    digest = hashlib.sha256(Path(origin).read_bytes()).hexdigest() if Path(origin).is_file() else ""
    return digest.startswith(tuple(name.rpartition("-")[2] for name in WITHOUT_EPSILON))


def _state_dicts(content: Any) -> list[tuple[str, StateDict]]:
    """State dicts in a checkpoint, with the key that each is under; a bare one is under none."""
    if is_state_dict(content):
        return [("", content)]
    if isinstance(content, Mapping):
        return [(key, content[key]) for key in WRAPPERS if is_state_dict(content.get(key))]
    return []


def _prefixes(state_dict: StateDict) -> list[str]:
    """What stands before the names of each torchvision detector in a state dict, e.g. `module.`."""
    names = [key.replace(COMPILED, "") for key in state_dict]
    found = [name.removesuffix(head) for name in names for head in HEADS if name.endswith(head)]
    return [prefix for prefix in found if any(name.startswith(f"{prefix}backbone.fpn.inner_blocks.") for name in names)]


def _detector_in(content: Any, origin: str) -> tuple[StateDict, StateDict, list[str]]:
    """The state dict as it is in a checkpoint, the same by today's names, and notes on what was chosen."""
    key, raw = next((key, found) for key, found in _state_dicts(content) if _prefixes(found))
    prefixes = _prefixes(raw)
    if len(prefixes) > 1:
        listed = ", ".join(f"{prefix}*" for prefix in prefixes)
        raise CheckpointError(f"{origin}: holds {len(prefixes)} detectors ({listed}); save the state dict of one")
    notes = ["a torchvision state dict"]
    if key.endswith("_ema"):
        notes.append(f"its moving average is taken (`{key}`)")
    if prefixes[0]:
        notes.append(f"the prefix `{prefixes[0]}` was taken off")
    plain = {name.replace(COMPILED, "").removeprefix(prefixes[0]): value for name, value in raw.items()}
    plain.pop("n_averaged", None)  # a counter of torch's AveragedModel
    return raw, renamed(plain), notes


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


def count_classes(state_dict: StateDict) -> int:
    """K without background, for which torchvision's RetinaNet and FCOS have a column too, though they never use it."""
    outputs = len(next(state_dict[head] for head in HEADS if head in state_dict))
    return outputs // (_anchors_in(state_dict) if HEADS[1] in state_dict else 1) - 1


def _anchors_in(state_dict: StateDict) -> int:
    """Anchors a cell of the weights."""
    regression = state_dict.get("head.regression_head.bbox_reg.bias")
    return len(state_dict["rpn.head.cls_logits.bias"]) if regression is None else len(regression) // 4


def _anchors(architecture: Architecture) -> int | None:
    """Anchors a cell of an architecture; None where torchvision's builder decides."""
    usual = {"faster_rcnn": 1, "retinanet": 3}.get(architecture.detector)
    if usual is None:
        return None
    per_ratio = len(architecture.anchor_sizes[0]) if architecture.anchor_sizes else usual
    return per_ratio * len(architecture.anchor_ratios)


def _require_known_anchors(
    state_dict: StateDict, made_of: Architecture, said: Architecture | None, origin: str
) -> None:
    found, usual = _anchors_in(state_dict), _anchors(made_of)
    if usual is None or usual == found:
        return
    if said is not None:
        with_said = replace(made_of, anchor_sizes=said.anchor_sizes, anchor_ratios=said.anchor_ratios)
        if _anchors(with_said) == found:
            return
    raise CheckpointError(
        f"{origin}: {found} anchors a cell, not the usual {usual}: their sizes are not in the file; {SAY_ANCHORS}"
    )


def _inferred(state_dict: StateDict, origin: str) -> Architecture:
    try:
        return infer_architecture(state_dict, origin)
    except KeyError as error:
        raise CheckpointError(
            f"{origin}: a torchvision detector, but not one that can be built here: it has no {error.args[0]}"
        ) from None


def infer_architecture(state_dict: StateDict, origin: str) -> Architecture:
    """What a torchvision detector is made of, from the names and shapes of its weights.

    Thresholds, which weights do not tell, are those of torchvision's own class.

    Raises:
        CheckpointError: names the part that is not recognised.
    """
    fpn = state_dict["backbone.fpn.inner_blocks.0.0.weight"].shape[0]
    backbone = _backbone(state_dict, origin)
    counted = any(key.startswith("backbone.body.") and key.endswith("num_batches_tracked") for key in state_dict)
    norm = "batch" if counted else "frozen"
    parts = {**backbone, "fpn_channels": fpn, "norm": norm}
    if "head.regression_head.bbox_reg.weight" in state_dict:
        family = "fcos" if "head.regression_head.bbox_ctrness.weight" in state_dict else "retinanet"
        if family == "retinanet" and "head.classification_head.conv.0.1.weight" in state_dict:
            return Architecture(detector="retinanet_resnet50_fpn_v2", norm=norm)
        return Architecture(detector=family, **parts, **_p6(state_dict), **own_settings(PLAIN_BUILDERS[family]))
    if "roi_heads.box_head.0.0.weight" in state_dict:
        return Architecture(detector="fasterrcnn_resnet50_fpn_v2", norm=norm)
    if parts["backbone"] == "mobilenet_v3_large" and _anchors_in(state_dict) == 15 and fpn == 256:
        return Architecture(detector="fasterrcnn_mobilenet_v3_large_fpn", norm=norm)
    head = state_dict["roi_heads.box_head.fc7.weight"].shape[0]
    return Architecture(detector="faster_rcnn", **parts, head_channels=head)


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
    raise CheckpointError(f"{origin}: a torchvision detector with a backbone that is not recognised")


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
