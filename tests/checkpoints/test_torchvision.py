"""torchvision's state dicts: what they are is read from their keys and shapes, or taken from the recipe."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch
from tiny import build
from torchvision.models import detection

from defeat_cli.checkpoints import torchvision as ours
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.config.architecture import PLAIN_BUILDERS, Architecture, Conventions, own_sizes, structure
from defeat_cli.config.given import COMMAND_LINE, given_settings
from defeat_cli.detectors.loading import load_detector
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
    assert structure(weights.architecture) == structure(architecture)
    assert weights.architecture.norm == architecture.norm
    if architecture.detector in PLAIN_BUILDERS:
        assert weights.architecture.conventions == architecture.conventions
    expected = {key: value.shape for key, value in state_dict.items()}
    assert {key: value.shape for key, value in shapes_of(weights.architecture).items()} == expected


FIRST = "backbone.body.stem.0.weight"


def tiny_state(seed: int) -> dict[str, torch.Tensor]:
    return dict(build(seed=seed).model.state_dict())


def shapes_of(architecture: Architecture) -> dict[str, torch.Tensor]:
    """The state dict of a detector of three classes, without numbers in it."""
    with torch.device("meta"):
        return build_detector(architecture, ["a", "b", "c"], [64], 64).model.state_dict()


WRAPPED = {
    "bare": lambda state: state,
    "a reference script's": lambda state: {"model": state, "epoch": 3},
    "DistributedDataParallel's": lambda state: {f"module.{key}": value for key, value in state.items()},
    "torch.compile's": lambda state: {"state_dict": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "Lightning's": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
    "compiled inside": lambda state: {key.replace("backbone.", "backbone._orig_mod."): v for key, v in state.items()},
    "all of them": lambda state: {f"model._orig_mod.module.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_and_prefixes_are_taken_off(tmp_path, kind):
    state = tiny_state(seed=0)
    torch.save(WRAPPED[kind](state), tmp_path / "model.pth")
    weights = load_weights(tmp_path / "model.pth")
    assert weights.state_dict.keys() == state.keys()
    assert all(torch.equal(weights.state_dict[key], value) for key, value in state.items())


def test_a_moving_average_is_taken_and_said(tmp_path):
    trained, average = tiny_state(seed=0), tiny_state(seed=1)
    kept = {"n_averaged": torch.tensor(5), **{f"module.{key}": value for key, value in average.items()}}
    torch.save({"model": trained, "model_ema": kept}, tmp_path / "model.pth")
    weights = load_weights(tmp_path / "model.pth")
    assert weights.state_dict.keys() == average.keys()
    assert torch.equal(weights.state_dict[FIRST], average[FIRST])
    assert not torch.equal(weights.state_dict[FIRST], trained[FIRST])
    assert "its moving average is taken (`model_ema`)" in weights.notes


def test_a_state_dict_of_two_detectors_is_refused(tmp_path):
    state = tiny_state(seed=0)
    both = {f"{who}.{key}": value for who in ("teacher", "student") for key, value in state.items()}
    torch.save({"state_dict": both}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"holds 2 detectors \(teacher\.\*, student\.\*\)"):
        load_weights(tmp_path / "model.pth")


def test_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = tiny_state(seed=0)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    weights = load_weights(tmp_path / "model.safetensors")
    assert all(torch.equal(weights.state_dict[key], value) for key, value in state.items())
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(CheckpointError, match="a damaged safetensors file"):
        load_weights(tmp_path / "model.safetensors")


def test_without_the_package_for_safetensors_its_name_is_said(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"pip install 'defeat-cli\[safetensors\]'"):
        load_weights(tmp_path / "model.safetensors")


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


BUILDERS = {
    "fasterrcnn_resnet50_fpn": {},
    "fasterrcnn_resnet50_fpn_v2": {},
    "fasterrcnn_mobilenet_v3_large_fpn": {},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"student.detector": "fasterrcnn_mobilenet_v3_large_320_fpn"},
    "retinanet_resnet50_fpn": {},
    "retinanet_resnet50_fpn_v2": {},
    "fcos_resnet50_fpn": {},
}


def in_force(model):
    """Everything that torchvision lets one set at inference."""
    of_boxes = getattr(model, "roi_heads", model)
    anchors = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    found = {
        "sides": (model.transform.min_size, model.transform.max_size),
        "normalization": (model.transform.image_mean, model.transform.image_std),
        "boxes": (of_boxes.score_thresh, of_boxes.nms_thresh, of_boxes.detections_per_img),
        "anchors": [cell.tolist() for cell in anchors.cell_anchors],
        "eps": {module.eps for module in model.backbone.body.modules() if hasattr(module, "running_var")},
    }
    if hasattr(model, "rpn"):
        rpn = model.rpn
        found["proposals"] = (rpn._pre_nms_top_n, rpn._post_nms_top_n, rpn.nms_thresh, rpn.score_thresh)
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builders_state_dict_runs_as_the_builder_runs_it(name):
    """With the builder's own name said where two builders have the same keys."""
    built = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4)
    given = given_settings(BUILDERS[name], COMMAND_LINE)
    loaded = load_detector(ours.to_weights(built.state_dict(), "model.pth"), given)
    expected, found = in_force(built), in_force(loaded.detector.model)
    if name.endswith("_v2"):
        expected["normalization"] = found["normalization"]  # None and the default are the same
    assert found == expected
    assert len(loaded.assumptions) == 1
    assert "does not say how it was run" in loaded.assumptions[0]


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_by_its_own_name_has_its_settings(name):
    built = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4)
    sides = own_sizes(name)
    ours_ = build_detector(Architecture(detector=name), ["a", "b", "c"], [sides["short_side"]], sides["long_side"])
    assert in_force(ours_.model) == in_force(built)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_the_first_published_weights_run_without_epsilon_whatever_their_name(name, tmp_path, monkeypatch):
    build = getattr(detection, name)
    state = build(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    expected = in_force(build(weights="COCO_V1"))
    assert expected["eps"] == {0.0}
    assert in_force(load_detector(f"torchvision:{name}").detector.model) == expected
    file = next(file for file in ours.WITHOUT_EPSILON if file.startswith(name))
    assert in_force(load_detector(ours.to_weights(state, f"models/{file}.pth")).detector.model) == expected
    assert in_force(load_detector(ours.to_weights(state, "models/mine.pth")).detector.model) != expected
    # Files of torchvision are named by their hash: it is known by it when someone has renamed it.
    torch.save(state, tmp_path / "mine.pth")
    digest = hashlib.sha256((tmp_path / "mine.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(ours, "WITHOUT_EPSILON", (f"{name}_coco-{digest[:8]}",))
    assert in_force(load_detector(str(tmp_path / "mine.pth")).detector.model) == expected


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
