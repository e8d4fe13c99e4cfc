"""Backbones: their structure, what is frozen in them, plain torchvision twins, ImageNet weights."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors import backbones
from defeat_cli.detectors.backbones import FrozenNorm, build_backbone, can_have_imagenet, load_backbone_weights
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError, RecipeError

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"
WIDTHS = [8, 16, 24, 32]
CLASSES = ["cat", "dog"]


def model_of(**keys) -> nn.Module:
    torch.manual_seed(0)
    return build_detector(Architecture(**keys), CLASSES, short_side=[64], long_side=96).model


def regnet_backbone(one_stage: bool, channels: int = 32) -> BackboneWithFPN:
    net = RegNet(BlockParams([1] * 4, WIDTHS, WIDTHS, [1.0] * 4, [2] * 4), stem_width=WIDTHS[0])
    body = nn.Sequential(OrderedDict([("stem", net.stem), *net.trunk_output.named_children()]))
    first, extra = (1, LastLevelP6P7(channels, channels)) if one_stage else (0, None)
    returned = {f"block{i + 1}": str(i - first) for i in range(first, 4)}
    return BackboneWithFPN(body, returned, WIDTHS[first:], channels, extra)


def plain_faster_rcnn(backbone: nn.Module, **sizes) -> FasterRCNN:
    """As a user would build it, for FPN 32 and a box head of 64."""
    return FasterRCNN(backbone, box_head=TwoMLPHead(32 * 49, 64), box_predictor=FastRCNNPredictor(64, 3), **sizes)


def mobilenet_v2_backbone() -> BackboneWithFPN:
    blocks = torchvision.models.mobilenet_v2().features
    return BackboneWithFPN(blocks, {"3": "0", "6": "1", "13": "2", "18": "3"}, [24, 32, 96, 1280], 32)


TINY = {"backbone": "regnet", "widths": WIDTHS, "fpn_channels": 32, "head_channels": 64, "norm": "batch"}
SIZES = {"min_size": 64, "max_size": 96}
TWINS = {
    "faster_rcnn-regnet": ({**TINY}, lambda: plain_faster_rcnn(regnet_backbone(False), **SIZES)),
    "retinanet-regnet": (
        {"detector": "retinanet", **TINY},
        lambda: RetinaNet(regnet_backbone(True), 3, detections_per_img=100, **SIZES),
    ),
    "fcos-regnet": (
        {"detector": "fcos", **TINY, "fpn_channels": 64},
        lambda: FCOS(regnet_backbone(True, 64), 3, score_thresh=0.05, nms_thresh=0.5, **SIZES),
    ),
    "faster_rcnn-mobilenet_v2": (
        {"backbone": "mobilenet_v2", "fpn_channels": 32, "head_channels": 64, "norm": "batch"},
        lambda: plain_faster_rcnn(mobilenet_v2_backbone(), **SIZES),
    ),
    "faster_rcnn-resnet18": (
        {"backbone": "resnet18"},
        lambda: FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 3, **SIZES),
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": (
        {"detector": "fasterrcnn_mobilenet_v3_large_fpn", "norm": "batch"},
        lambda: detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=3, **SIZES
        ),
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_state_dict_loads_strict_into_plain_torchvision_and_detects_the_same(name):
    keys, build_twin = TWINS[name]
    ours, twin = model_of(**keys).eval(), build_twin().eval()
    torch.manual_seed(1)
    for name, parameter in ours.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.0, 0.2)
        elif "cls" in name or "bbox" in name:
            nn.init.normal_(parameter, std=1e-3)
        else:
            nn.init.kaiming_normal_(parameter)
    # A plain dict: without the version numbers that torch keeps beside a state dict.
    twin.load_state_dict(dict(ours.state_dict()), strict=True)
    images = [torch.rand(3, 70, 80)]
    with torch.no_grad():
        one, other = ours(images)[0], twin(images)[0]
    assert len(one["boxes"]) > 0
    for key in ("boxes", "scores", "labels"):
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize(
    ("backbone", "last", "channels"),
    [
        ("mobilenet_v2", [3, 6, 13, 18], [24, 32, 96, 1280]),
        ("mobilenet_v3_large", [3, 6, 12, 16], [24, 40, 112, 960]),
        ("mobilenet_v3_small", [1, 3, 8, 12], [16, 24, 48, 576]),
    ],
)
def test_mobilenet_stages_end_before_the_next_stride(backbone, last, channels):
    """Block numbers counted by hand in the papers' tables (stem is 0)."""
    built = build_backbone(Architecture(backbone=backbone, fpn_channels=16), one_stage=False)
    assert list(built.body.return_layers) == [str(index) for index in last]
    assert [block[0].in_channels for block in built.fpn.inner_blocks] == channels


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_small", "regnet"])
@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages_are_counted_from_the_stem(backbone, frozen):
    widths = WIDTHS if backbone == "regnet" else None
    keys = {"backbone": backbone, "widths": widths, "fpn_channels": 16, "norm": "batch", "frozen_stages": frozen}
    body = build_backbone(Architecture(**keys), one_stage=False).body
    stages = {
        "resnet18": [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]],
        "mobilenet_v3_small": [["0"], ["1"], ["2", "3"], list("45678"), ["9", "10", "11", "12"]],
        "regnet": [["stem"], ["block1"], ["block2"], ["block3"], ["block4"]],
    }[backbone]
    for stage, names in enumerate(stages):
        for name in names:
            parts = dict(body.named_children())[name]
            assert all(p.requires_grad == (stage >= frozen) for p in parts.parameters())
            norms = [m for m in parts.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
            assert all(isinstance(norm, FrozenBatchNorm2d) == (stage < frozen) for norm in norms)


def test_norms_keep_the_epsilon_that_their_weights_were_trained_with():
    def epsilons(**keys) -> set[float]:
        body = build_backbone(Architecture(fpn_channels=16, **keys), one_stage=False).body
        return {module.eps for module in body.modules() if isinstance(module, FrozenBatchNorm2d)}

    assert epsilons(backbone="mobilenet_v3_small") == {1e-3}
    assert epsilons(backbone="resnet18") == {1e-5}
    assert epsilons(backbone="resnet18", conventions={"batch_norm_eps": 0.0}) == {0.0}


def test_builders_take_their_norm_from_the_architecture():
    frozen = model_of(detector="fasterrcnn_mobilenet_v3_large_fpn", frozen_stages=2)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert not any(p.requires_grad for name in "0123" for p in frozen.backbone.body[name].parameters())
    assert all(p.requires_grad for p in frozen.backbone.body["4"].parameters())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"anchor_sizes": [[32.0], [64.0]]}, "anchor_sizes: expected 5 lists"),
        ({"anchor_sizes": [[32.0], [64.0], [128.0], [256.0], [512.0, 600.0]]}, "anchor_sizes"),
        ({"detector": "fcos", "fpn_channels": 48}, "fpn_channels: must be 64, 96"),
        ({"detector": "fcos", "fpn_channels": 32}, "fpn_channels: must be 64, 96"),
        ({"detector": "fcos", "anchor_sizes": [[8.0]] * 5}, "anchor_sizes: fcos"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(keys, named):
    with pytest.raises(RecipeError, match=named):
        model_of(**{"backbone": "regnet", "widths": WIDTHS, **keys})


@pytest.mark.parametrize(
    ("backbone", "first"), [("resnet18", "conv1"), ("mobilenet_v3_small", "0.0"), ("regnet", "stem.0")]
)
def test_imagenet_weights_from_a_file(tmp_path, backbone, first):
    if backbone == "regnet":
        net = RegNet(BlockParams([1] * 4, WIDTHS, WIDTHS, [1.0] * 4, [2] * 4), stem_width=WIDTHS[0])
    else:
        net = torchvision.models.get_model(backbone, weights=None)
    file = tmp_path / "imagenet.pth"
    torch.save({key: v.half() if v.is_floating_point() else v for key, v in net.state_dict().items()}, file)
    architecture = Architecture(backbone=backbone, widths=WIDTHS if backbone == "regnet" else None, fpn_channels=16)
    model = build_detector(architecture, CLASSES, [64], 96).model
    load_backbone_weights(model, str(file), architecture)
    loaded = model.backbone.body.get_submodule(first).weight
    assert torch.equal(loaded, next(net.parameters()).half().float())


def test_a_variance_that_overflowed_in_half_precision_is_taken_for_the_largest(tmp_path):
    """ResNet-50 from Keras has a stem variance past 65504; as infinity it would silence its channel."""
    state = {
        key: v.half() if v.is_floating_point() else v for key, v in torchvision.models.resnet18().state_dict().items()
    }
    state["bn1.running_var"][3] = float("inf")
    file = tmp_path / "half.pth"
    torch.save(state, file)
    architecture = Architecture(backbone="resnet18", fpn_channels=16)
    model = build_detector(architecture, CLASSES, [64], 96).model
    load_backbone_weights(model, str(file), architecture)
    assert model.backbone.body.bn1.running_var[3] == 65504
    state["layer1.0.conv1.weight"][0] = float("inf")
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight"):
        load_backbone_weights(model, str(file), architecture)


def test_weights_of_another_network_are_refused_whole(tmp_path):
    file = tmp_path / "imagenet.pth"
    torch.save(torchvision.models.resnet34().state_dict(), file)
    architecture = Architecture(backbone="resnet18", fpn_channels=16)
    model = build_detector(architecture, CLASSES, [64], 96).model
    before = model.backbone.body.conv1.weight.clone()
    with pytest.raises(CheckpointError, match=r"unexpected[\s\S]*layer1\.2"):
        load_backbone_weights(model, str(file), architecture)
    assert torch.equal(model.backbone.body.conv1.weight, before)
    torch.save({"epoch": 3}, file)
    with pytest.raises(CheckpointError, match="found a dict with epoch"):
        load_backbone_weights(model, str(file), architecture)


def test_imagenet_without_a_network_or_weights_says_so(monkeypatch):
    def no_network(*_args, **_kwargs):
        raise OSError("name resolution failed")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", no_network)
    architecture = Architecture(backbone="resnet18", fpn_channels=16)
    model = build_detector(architecture, CLASSES, [64], 96).model
    with pytest.raises(CheckpointError, match=r"resnet18 could not be downloaded .*give a file"):
        load_backbone_weights(model, "imagenet", architecture)
    regnet = Architecture(backbone="regnet", widths=WIDTHS, fpn_channels=16)
    with pytest.raises(CheckpointError, match="no ImageNet weights for regnet"):
        load_backbone_weights(build_detector(regnet, CLASSES, [64], 96).model, "imagenet", regnet)


@pytest.mark.parametrize(
    ("backbone", "file"),
    [("mobilenet_v2", "mobilenet_v2-b0353104.pth"), ("resnet50", "resnet50_imagenet_fp16.pth")],
)
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no weights beside the repository")
def test_real_imagenet_weights_load_strict(backbone, file):
    architecture = Architecture(backbone=backbone, fpn_channels=16, head_channels=16)
    model = build_detector(architecture, CLASSES, [64], 96).model
    load_backbone_weights(model, str(WEIGHTS / file), architecture)
    statistics = [v for k, v in model.backbone.body.state_dict().items() if k.endswith("running_var")]
    assert all(not bool((v == 1).all()) for v in statistics)


def test_whether_imagenet_weights_can_be_had(tmp_path, monkeypatch):
    asked = []

    def unreachable(request, timeout):
        asked.append((request.get_method(), request.full_url, timeout))
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(backbones, "urlopen", unreachable)
    assert not can_have_imagenet("mobilenet_v2")
    assert asked == [("HEAD", "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth", 5)]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mobilenet_v2-b0353104.pth").touch()
    assert can_have_imagenet("mobilenet_v2")
    assert not can_have_imagenet("regnet")
    assert len(asked) == 1
    monkeypatch.setattr(backbones, "urlopen", lambda request, timeout: nullcontext())
    assert can_have_imagenet("resnet50")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_frozen_norm_by_hand(dtype):
    """2 · (3 - 1) / sqrt(1 + 3) + 0.5 = 2.5, in the dtype that came."""
    norm = FrozenNorm(1, eps=3.0)
    for name, value in (("weight", 2.0), ("bias", 0.5), ("running_mean", 1.0), ("running_var", 1.0)):
        getattr(norm, name).fill_(value)
    found = norm(torch.full((1, 1, 2, 2), 3.0, dtype=dtype))
    assert found.dtype == dtype
    assert found.unique().tolist() == [2.5]
