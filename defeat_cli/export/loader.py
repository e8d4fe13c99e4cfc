"""A script that loads one detector's state dict in plain torchvision, written for exactly that detector."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from pprint import pformat

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from defeat_cli.config.architecture import TORCHVISION_BUILDERS, Architecture, Conventions, without_effect
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.files import replacing

TEMPLATE = '''\
"""Loads {weights} in plain torchvision: `model = load()`, or `python {script} IMAGE`. Written by defeat."""

import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.functional import pil_to_tensor

# Label i + 1 is CLASSES[i]; label 0 is background.
CLASSES = {classes}


def load(weights=Path(__file__).with_name({weights!r})):
    """The detector in eval mode. It takes a list of [3, H, W] RGB images in [0, 1] of any size."""
{body}
    # A plain dict, for which torch fills in the counters of batches that frozen norms do not have.
    model.load_state_dict(dict(torch.load(weights, map_location="cpu", weights_only=True)))
    return model.eval()


if __name__ == "__main__":
    image = pil_to_tensor(ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")) / 255
    with torch.no_grad():
        (found,) = load()([image])
    for box, score, label in zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist()):
        print(f"{{CLASSES[label - 1]}} {{score:.3f}}", [round(side, 1) for side in box])
'''

OTHERWISE = {
    "roi_align_aligned": "RoIAlign shifts boxes by half a pixel",
    "nominal_strides": "anchors are spaced by the level's nominal stride",
    "p7_relu": "no ReLU stands between P6 and P7",
    "clip_after_nms": "boxes are clipped after non-maximum suppression",
    "clip_proposals": "proposals are not clipped to the image",
    "clip_detections": "detections are not clipped to the image",
    "smallest_box": "how small boxes may be that are kept",
    "suppression": "suppression lowers scores (soft-NMS)",
    "suppression_across_classes": "detections suppress those of other classes too",
    "edge_cases": "empty boxes, extreme deltas and regions on the edge of two levels",
}
"""Conventions of other libraries that no argument of torchvision's gives."""


def loader_source(
    architecture: Architecture, classes: list[str], short_side: int, long_side: int, weights: str = "student.pth"
) -> str:
    """A Python script that loads a detector's state dict in plain torchvision, with nothing of ours.

    Args:
        architecture: what the detector is made of.
        short_side, long_side: resizing at inference, pixels.
        weights: name of the state dict's file, beside which the script is to stand.

    Returns:
        A script named `loader_name(weights)` that defines `CLASSES` and `load()`. Where torchvision cannot compute what
        the detector computes, a comment says what differs.
    """
    # On the meta device a model costs neither memory nor random numbers; it is only asked for its settings.
    with torch.device("meta"):
        model = build_detector(architecture, classes, [short_side], long_side).model.eval()
    if architecture.detector in TORCHVISION_BUILDERS:
        lines = _call(f"model = detection.{architecture.detector}", _builder_arguments(model))
    else:
        lines = [*_backbone(model, architecture), *_detector(model, architecture), *_differences(architecture)]
    lines += _norms_and_strides(architecture.conventions)
    body = "\n".join(f"    {line}" if line else "" for line in lines)
    listed = pformat(classes, width=100, compact=True)
    source = TEMPLATE.format(weights=weights, script=loader_name(weights), classes=listed, body=body)
    return _without_idle_imports(source)


def write_loader(
    weights: Path, architecture: Architecture, classes: list[str], short_side: int, long_side: int
) -> Path:
    """Write the script beside the state dict `weights`, and give its path."""
    path = weights.with_name(loader_name(weights.name))
    with replacing(path) as temporary:
        temporary.write_text(
            loader_source(architecture, classes, short_side, long_side, weights.name), encoding="utf-8"
        )
    return path


def loader_name(weights: str) -> str:
    """The script's file name: `load_student.py` for `student.pth`."""
    return f"load_{weights.rpartition('.')[0] or weights}.py"


def _call(function: str, arguments: list[str]) -> list[str]:
    """A call, one argument a line."""
    return [f"{function}(", *(f"    {argument}," for argument in arguments), ")"]


def _resizing(model: nn.Module) -> list[str]:
    """Image sizes, and normalisation where it is not torchvision's own."""
    transform, usual = model.transform, Conventions()
    lines = [f"min_size={transform.min_size[-1]}", f"max_size={transform.max_size}"]
    lines += [
        f"{name}={list(getattr(transform, name))}"
        for name in ("image_mean", "image_std")
        if list(getattr(transform, name)) != getattr(usual, name)
    ]
    if transform.fixed_size is not None:
        lines.append(f"fixed_size={tuple(transform.fixed_size)}")
    return lines


def _selection(model: nn.Module) -> list[str]:
    """Thresholds and counts that decide what is detected."""
    if not isinstance(model, FasterRCNN):
        names = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
        return [f"{name}={getattr(model, name)}" for name in names]
    heads = model.roi_heads
    return [
        f"rpn_pre_nms_top_n_test={model.rpn.pre_nms_top_n()}",
        f"rpn_post_nms_top_n_test={model.rpn.post_nms_top_n()}",
        f"rpn_nms_thresh={model.rpn.nms_thresh}",
        f"box_score_thresh={heads.score_thresh}",
        f"box_nms_thresh={heads.nms_thresh}",
        f"box_detections_per_img={heads.detections_per_img}",
    ]


def _builder_arguments(model: nn.Module) -> list[str]:
    return [
        "weights=None",
        "weights_backbone=None",
        "num_classes=len(CLASSES) + 1",
        *_resizing(model),
        *_selection(model),
    ]


def _backbone(model: nn.Module, architecture: Architecture) -> Iterator[str]:
    """Lines that make the backbone with its FPN."""
    name, norm = architecture.backbone, "norm_layer=nn.BatchNorm2d"
    if name.startswith("mobilenet_v3"):
        norm = "norm_layer=partial(nn.BatchNorm2d, eps=0.001)"
    if architecture.norm == "frozen":
        norm = norm.replace("nn.BatchNorm2d", "FrozenBatchNorm2d")
    elif architecture.frozen_stages:
        yield "# Norms of the stages that training froze are BatchNorm here; in eval mode they compute the same."
    if name == "regnet":
        widths, depths = architecture.widths, architecture.depths or [1] * 4
        yield f"blocks = BlockParams({depths}, {widths}, {widths}, [1.0] * 4, [2] * 4)"
        yield f"net = RegNet(blocks, stem_width={widths[0]}, {norm})"
        yield 'body = nn.Sequential(OrderedDict([("stem", net.stem), *net.trunk_output.named_children()]))'
    elif name == "resnext101_32x4d":
        yield f"body = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, {norm})"
    else:
        features = ".features" if name.startswith("mobilenet") else ""
        yield f"body = torchvision.models.{name}(weights=None, {norm}){features}"
    fpn = model.backbone.fpn
    stages = [block[0].in_channels for block in fpn.inner_blocks]
    levels = dict(model.backbone.body.return_layers)
    extra = ""
    if isinstance(fpn.extra_blocks, LastLevelP6P7):
        p6 = fpn.extra_blocks.p6
        extra = f", LastLevelP6P7({p6.in_channels}, {p6.out_channels})"
    yield f"levels = {json.dumps(levels)}"
    yield f"backbone = BackboneWithFPN(body, levels, {stages}, {architecture.fpn_channels}{extra})"
    if extra and fpn.extra_blocks.use_P5 != (p6.in_channels == p6.out_channels):
        yield "# torchvision tells C5 from P5 by the channels, which are the same here."
        yield f"backbone.fpn.extra_blocks.use_P5 = {fpn.extra_blocks.use_P5}"


def _detector(model: nn.Module, architecture: Architecture) -> Iterator[str]:
    """Lines that make the detector of `backbone`."""
    if isinstance(model, FCOS):
        yield from _call(
            "model = FCOS", ["backbone", "num_classes=len(CLASSES) + 1", *_resizing(model), *_selection(model)]
        )
        return
    conventions, channels, head = architecture.conventions, architecture.fpn_channels, architecture.head_channels
    two_stage = isinstance(model, FasterRCNN)
    generator = model.rpn.anchor_generator if two_stage else model.anchor_generator
    yield from _call("sizes = ", [repr(level) for level in generator.sizes])
    yield f"ratios = {tuple(generator.aspect_ratios[0])}"
    yield "anchors = AnchorGenerator(sizes, (ratios,) * len(sizes))"
    if not conventions.rounded_anchors or conventions.anchor_order == "sizes-first":
        yield from _cell_anchors(conventions)
    if two_stage:
        ratio = conventions.roi_align_sampling_ratio
        arguments = [
            "backbone",
            *_resizing(model),
            "rpn_anchor_generator=anchors",
            f'box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio={ratio})',
            f"box_head=TwoMLPHead({channels} * 7 * 7, {head})",
            f"box_predictor=FastRCNNPredictor({head}, len(CLASSES) + 1)",
        ]
        yield from _call("model = FasterRCNN", [*arguments, *_selection(model)])
    else:
        arguments = ["backbone", "num_classes=len(CLASSES) + 1", *_resizing(model), "anchor_generator=anchors"]
        yield from _call("model = RetinaNet", [*arguments, *_selection(model)])


def _cell_anchors(conventions: Conventions) -> Iterator[str]:
    """Lines that give `anchors` the sides of another library: not rounded, or in another order."""
    swap = ".transpose(0, 1)" if conventions.anchor_order == "sizes-first" else ""
    rounded = ".round()" if conventions.rounded_anchors else ""
    yield "# Sides and order of the anchors are those of the library that trained the detector."
    yield "stretch = torch.tensor(ratios, dtype=torch.float64).sqrt()[:, None]"
    yield "for level, sides in enumerate(sizes):"
    yield "    sides = torch.tensor(sides, dtype=torch.float64)"
    yield "    halves = torch.stack([sides / stretch, sides * stretch], dim=-1) / 2"
    yield f"    cells = torch.cat([-halves, halves], dim=-1){swap}.reshape(-1, 4).float()"
    yield f"    anchors.cell_anchors[level] = cells{rounded}"


def _differences(architecture: Architecture) -> list[str]:
    """A comment on what torchvision cannot be told, where there is something."""
    conventions, usual = architecture.conventions, Conventions()
    idle = without_effect(architecture)
    lines = [
        f"#   {text}"
        for name, text in OTHERWISE.items()
        if f"conventions.{name}" not in idle and getattr(conventions, name) != getattr(usual, name)
    ]
    if not lines:
        return []
    return [
        "# The library that trained this detector computes a few things otherwise, for which plain torchvision has no",
        "# setting, so detections differ a little:",
        *lines,
    ]


def _norms_and_strides(conventions: Conventions) -> list[str]:
    """Lines that change modules of the backbone which no argument reaches."""
    lines = []
    if conventions.batch_norm_eps is not None:
        lines += [
            "    if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):",
            f"        module.eps = {conventions.batch_norm_eps}",
        ]
    if conventions.stride_in_1x1:
        lines += [
            "    if isinstance(module, Bottleneck):",
            "        module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride",
        ]
    return ["for module in model.backbone.body.modules():", *lines] if lines else []


def _without_idle_imports(source: str) -> str:
    """The script without the imports that this detector does not need."""
    imports, marker, rest = source.partition("\n# Label")

    def kept(line: re.Match[str]) -> str:
        names = [name for name in line["names"].split(", ") if re.search(rf"\b{name}[.(,)]", rest)]
        return f"{line['start']}{', '.join(names)}\n" if names else ""

    line = r"^(?P<start>(?:from \S+ )?import )(?P<names>.+)\n"
    return re.sub(line, kept, imports, flags=re.MULTILINE) + marker + rest
