"""torchvision's state dicts: what they are is read from their keys and shapes, or taken from the recipe."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import detection

from defeat_cli.checkpoints import torchvision as ours
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError

ZOO = [
    {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 48},
    {"backbone": "resnet34", "norm": "batch"},
    {"backbone": "resnet101"},
    {"backbone": "resnext50_32x4d"},
    {"backbone": "mobilenet_v2", "fpn_channels": 64},
    {"backbone": "mobilenet_v3_large", "fpn_channels": 64},
    {"backbone": "mobilenet_v3_small", "fpn_channels": 64},
    {"backbone": "regnet", "widths": [8, 16, 24, 32], "depths": [1, 2, 1, 3], "fpn_channels": 16, "head_channels": 8},
    {"detector": "retinanet", "backbone": "resnet18", "fpn_channels": 32},
    {"detector": "retinanet", "backbone": "resnet18", "conventions": Conventions(p6_from="c5")},
    {"detector": "fcos", "backbone": "regnet", "widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "fpn_channels": 64},
    {"detector": "fasterrcnn_resnet50_fpn_v2"},
    {"detector": "fasterrcnn_mobilenet_v3_large_fpn"},
    {"detector": "retinanet_resnet50_fpn_v2"},
]


@pytest.mark.parametrize("parts", ZOO, ids=lambda parts: "-".join(str(v) for v in parts.values() if isinstance(v, str)))
def test_a_detector_is_known_by_its_keys_and_shapes(parts):
    architecture = Architecture(**parts)
    state_dict = shapes_of(architecture)
    assert ours.matches(state_dict)
    weights = ours.to_weights(state_dict, "student.pth")
    assert weights.num_classes == 3
    assert weights.classes is None
    if architecture.detector in ("faster_rcnn", "retinanet", "fcos"):
        assert weights.architecture == architecture
    assert weights.architecture.detector == architecture.detector
    expected = {key: value.shape for key, value in state_dict.items()}
    assert {key: value.shape for key, value in shapes_of(weights.architecture).items()} == expected


def shapes_of(architecture: Architecture) -> dict[str, torch.Tensor]:
    """The state dict of a detector of three classes, without numbers in it."""
    with torch.device("meta"):
        return build_detector(architecture, ["a", "b", "c"], [64], 64).model.state_dict()


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_wrappers_and_a_distributed_prefix(tmp_path, wrapper):
    model = detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=3)
    content = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "model.pth")
    weights = load_weights(tmp_path / "model.pth", Architecture(detector="fasterrcnn_mobilenet_v3_large_320_fpn"))
    assert weights.architecture.detector == "fasterrcnn_mobilenet_v3_large_320_fpn"
    assert weights.state_dict.keys() == model.state_dict().keys()
    assert any("module." in note for note in weights.notes)


OLD_NAMES = [
    ("backbone.fpn.inner_blocks.2.weight", "backbone.fpn.inner_blocks.2.0.weight"),
    ("backbone.fpn.layer_blocks.0.bias", "backbone.fpn.layer_blocks.0.0.bias"),
    ("rpn.head.conv.weight", "rpn.head.conv.0.0.weight"),
    ("head.classification_head.conv.0.bias", "head.classification_head.conv.0.0.bias"),
    ("head.regression_head.conv.6.weight", "head.regression_head.conv.3.0.weight"),
    ("head.regression_head.conv.3.0.weight", "head.regression_head.conv.3.0.weight"),
]


@pytest.mark.parametrize(("old", "new"), OLD_NAMES)
def test_names_of_published_files_become_todays(old, new):
    assert list(ours.renamed({old: torch.ones(1)})) == [new]


def test_fcos_keeps_names_that_retinanet_once_had():
    state_dict = {f"head.classification_head.conv.{i}.weight": torch.ones(1) for i in (0, 3, 6)}
    state_dict["head.regression_head.bbox_ctrness.weight"] = torch.ones(1)
    assert ours.renamed(state_dict).keys() == state_dict.keys()


def test_coco_names():
    ninety, eighty = ours.coco_classes(90), ours.coco_classes(80)
    assert (ninety[0], ninety[11], ninety[12], ninety[89]) == ("person", "N/A", "stop sign", "toothbrush")
    assert (eighty[0], eighty[11], eighty[79], len(eighty)) == ("person", "stop sign", "toothbrush", 80)
    assert "N/A" not in eighty
    assert ours.coco_classes(20) is None


def test_published_weights_of_the_first_version_have_no_epsilon():
    with torch.device("meta"):
        model = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    published = ours.to_weights(model.state_dict(), "models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    assert published.architecture.conventions.batch_norm_eps == 0
    assert published.classes[0] == "person"
    assert ours.to_weights(model.state_dict(), "models/mine.pth").architecture.conventions.batch_norm_eps is None


def test_anchors_that_the_file_does_not_tell_are_asked_for():
    state_dict = {**shapes_of(Architecture(backbone="resnet18")), "rpn.head.cls_logits.bias": torch.zeros(7)}
    with pytest.raises(CheckpointError, match=r"7 anchors a cell, not the usual 3.*recipe"):
        ours.to_weights(state_dict, "model.pth")


def test_another_kind_of_head_is_asked_for():
    state_dict = shapes_of(Architecture(backbone="resnet18"))
    del state_dict["roi_heads.box_head.fc7.weight"]
    with pytest.raises(CheckpointError, match=r"has no roi_heads\.box_head\.fc7\.weight; say what it is"):
        ours.to_weights(state_dict, "model.pth")


def test_an_unknown_builder_gets_the_nearest_name():
    with pytest.raises(CheckpointError, match="did you mean fasterrcnn_resnet50_fpn"):
        load_weights("torchvision:faster_rcnn_resnet50_fpn")


def test_without_a_network_the_address_is_said(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(CheckpointError, match=r"could not be fetched from https://download\.pytorch\.org"):
        load_weights("torchvision:fcos_resnet50_fpn")


def test_published_weights_by_name(monkeypatch):
    with torch.device("meta"):
        model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: model.state_dict())
    weights = load_weights("torchvision:retinanet_resnet50_fpn")
    assert weights.architecture.detector == "retinanet_resnet50_fpn"
    assert weights.architecture.conventions.batch_norm_eps == 0
    assert (weights.num_classes, weights.short_side, weights.long_side) == (90, 800, 1333)
