"""`load_student.py`: a script of its own, whose model detects what our detector detects, to float rounding."""

import ast
import importlib.util
import runpy

import pytest
import torch
from export.random_detectors import random_detector
from PIL import Image

from defeat_cli.config.architecture import (
    BACKBONES,
    DETECTOR_FAMILIES,
    INFERENCE,
    TORCHVISION_BUILDERS,
    Architecture,
    without_effect,
)
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.export.loader import loader_name, loader_source

CLASSES = ["cat", 'a "quoted" \\ name', "kräftig"]
SMALL = {"faster_rcnn": {"fpn_channels": 16, "head_channels": 32}, "retinanet": {"fpn_channels": 16}}
SMALL["fcos"] = {"fpn_channels": 64}
WIDTHS = {"regnet": {"widths": [8, 8, 16, 16], "depths": [1, 2, 1, 1]}}
HEAVY = (
    "resnet34",
    "resnext50_32x4d",
    "resnet101",
    "resnet152",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)
"""Their script differs from a lighter one's by the name alone; they are held to it without running the network."""


def load_by_script(folder, source):
    """The model that a script loads, from a file of its own, as a user would import it."""
    path = folder / "load_student.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("load_student", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.CLASSES == CLASSES
    return module.load()


def detections(folder, architecture, sides=(64, 96)):
    """What our detector and the one of the script detect on the same image."""
    model = random_detector(CLASSES, architecture, *sides).model
    torch.save(model.state_dict(), folder / "student.pth")
    twin = load_by_script(folder, loader_source(architecture, CLASSES, *sides))
    assert not twin.training
    image = torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model([image])[0], twin([image])[0]


def assert_same(ours, theirs):
    assert len(ours["boxes"]) > 0
    assert torch.equal(ours["labels"], theirs["labels"])
    torch.testing.assert_close(theirs["scores"], ours["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs["boxes"], ours["boxes"], rtol=0, atol=1e-2)


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in HEAVY])
def test_every_backbone(tmp_path, backbone):
    keys = {"backbone": backbone, **SMALL["faster_rcnn"], **WIDTHS.get(backbone, {}), "score_threshold": 0.01}
    assert_same(*detections(tmp_path, Architecture(**keys)))


@pytest.mark.parametrize("backbone", HEAVY)
def test_a_heavy_backbone_has_the_same_tensors(tmp_path, backbone):
    architecture = Architecture(backbone=backbone, **SMALL["faster_rcnn"])
    source = loader_source(architecture, CLASSES, 64, 96)
    (tmp_path / "student.pth").touch()
    with torch.device("meta"):
        ours = build_detector(architecture, CLASSES, [64], 96).model.state_dict()
        path = tmp_path / "load_student.py"
        path.write_text(source.replace("model.load_state_dict", "return model\n    model.load_state_dict"))
        names = {"__name__": "load_student", "__file__": str(path)}
        exec(path.read_text(), names)
        theirs = names["load"]().state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}


NORMS = [{"norm": "batch"}, {"norm": "frozen"}, {"norm": "batch", "frozen_stages": 2}]
KINDS = ["resnet18", "mobilenet_v3_small", "regnet"]
SQUARE = [(DETECTOR_FAMILIES[i], KINDS[j], NORMS[(i + j) % 3]) for i in range(3) for j in range(3)]
"""Each family, kind of backbone and kind of norm with each other, pair by pair."""


@pytest.mark.parametrize(("family", "backbone", "norm"), SQUARE)
def test_every_family_with_every_kind_of_norm(tmp_path, family, backbone, norm):
    keys = {"backbone": backbone, **SMALL[family], **WIDTHS.get(backbone, {}), **norm, "score_threshold": 0.01}
    assert_same(*detections(tmp_path, Architecture(detector=family, **keys)))


@pytest.mark.parametrize(
    "builder", ["fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"]
)
def test_torchvisions_builders(tmp_path, builder):
    assert_same(*detections(tmp_path, Architecture(detector=builder, frozen_stages=1)))


@pytest.mark.parametrize("builder", TORCHVISION_BUILDERS)
def test_every_builder_is_called_by_its_name(builder):
    assert f"model = detection.{builder}(\n" in loader_source(Architecture(detector=builder), CLASSES, 64, 96)


SETTINGS = {
    "faster_rcnn": {
        "anchor_sizes": [[8], [16], [32], [64], [96]], "anchor_ratios": [0.5, 1.0], "proposals": 20,
        "nms_threshold": 0.3, "detections_per_image": 7,
        "conventions": {
            "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "batch_norm_eps": 0.01,
            "rounded_anchors": False, "roi_align_sampling_ratio": 0,
        },
    },
    "retinanet": {
        "anchor_sizes": [[8, 11], [16, 22], [32, 45], [64, 90], [96, 120]],
        "conventions": {"rounded_anchors": False, "anchor_order": "sizes-first", "p6_from": "c5"},
    },
    "fcos": {"widths": [8, 8, 16, 64], "conventions": {"p6_from": "c5", "image_mean": [0.0, 0.0, 0.0]}},
}  # fmt: skip


@pytest.mark.parametrize("family", DETECTOR_FAMILIES)
def test_settings_that_plain_torchvision_has(tmp_path, family):
    keys = {"detector": family, "backbone": "regnet", "norm": "batch", **SMALL[family], "widths": [8, 8, 16, 16]}
    architecture = Architecture(**(keys | SETTINGS[family]), score_threshold=0.02)
    assert_same(*detections(tmp_path, architecture))
    assert "plain torchvision has no" not in loader_source(architecture, CLASSES, 64, 96)


def test_the_stride_of_the_first_convolution(tmp_path):
    keys = {"backbone": "resnet50", **SMALL["faster_rcnn"], "conventions": {"stride_in_1x1": True}}
    assert_same(*detections(tmp_path, Architecture(**keys, score_threshold=0.01)))


@pytest.mark.parametrize(
    ("family", "conventions", "told"),
    [
        ("faster_rcnn", {"roi_align_aligned": True}, ["half a pixel"]),
        ("faster_rcnn", {"edge_cases": "mmdetection", "p7_relu": False}, ["empty boxes"]),
        ("retinanet", {"p7_relu": False, "clip_after_nms": True}, ["no ReLU", "after non-maximum suppression"]),
        ("fcos", {"p7_relu": False}, ["no ReLU"]),
    ],
)
def test_what_plain_torchvision_cannot_do_is_told(family, conventions, told):
    keys = {"detector": family, "backbone": "resnet18", **SMALL[family]}
    source = loader_source(Architecture(**keys, conventions=conventions), CLASSES, 64, 96)
    comment = source[source.index("has no\n") :].split("# A plain dict")[0]
    assert [text in comment for text in told] == [True] * len(told)
    assert comment.count("#   ") == len(told)


@pytest.mark.parametrize("family", DETECTOR_FAMILIES)
@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "regnet", "resnext101_32x4d"])
def test_a_script_imports_what_it_needs_and_no_more(family, backbone):
    keys = {"detector": family, "backbone": backbone, **SMALL[family], **WIDTHS.get(backbone, {})}
    tree = ast.parse(loader_source(Architecture(**keys), CLASSES, 64, 96))
    imported = {a.name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used
    assert not any("defeat" in name for name in imported)


OTHER_VALUES = {
    "anchor_sizes": [[8], [16], [32], [64], [96]], "anchor_ratios": [1.0], "proposals": 20, "proposals_before_nms": 30,
    "proposal_nms_threshold": 0.6, "candidates_per_level": 40, "score_threshold": 0.3, "nms_threshold": 0.4,
    "detections_per_image": 9,
    "conventions.image_mean": [0.1, 0.2, 0.3], "conventions.image_std": [0.4, 0.5, 0.6],
    "conventions.stride_in_1x1": True, "conventions.batch_norm_eps": 0.01, "conventions.roi_align_aligned": True,
    "conventions.roi_align_sampling_ratio": 0, "conventions.rounded_anchors": False,
    "conventions.anchor_order": "sizes-first", "conventions.nominal_strides": True, "conventions.p6_from": "c5",
    "conventions.p7_relu": False, "conventions.clip_after_nms": True, "conventions.clip_proposals": False,
    "conventions.clip_detections": False, "conventions.smallest_box": 2.0, "conventions.suppression": "linear",
    "conventions.suppression_across_classes": True, "conventions.keep_ratio": False,
    "conventions.edge_cases": "mmdetection",
}  # fmt: skip
"""Another value than the usual of each setting that decides what is detected."""


@pytest.mark.parametrize("family", DETECTOR_FAMILIES)
def test_every_setting_is_in_the_script_or_told(family):
    usual = Architecture(detector=family, backbone="resnet50")
    assert set(INFERENCE) - set(OTHER_VALUES) - without_effect(usual) == set()
    plain = loader_source(usual, CLASSES, 64, 96)
    for name, value in OTHER_VALUES.items():
        if name not in without_effect(usual):
            section, _, key = name.rpartition(".")
            keys = {section: {key: value}} if section else {key: value}
            changed = Architecture(detector=family, backbone="resnet50", **keys)
            assert loader_source(changed, CLASSES, 64, 96) != plain, name


def test_no_random_number_is_drawn_and_the_name_goes_with_the_weights():
    before = torch.get_rng_state()
    source = loader_source(Architecture(backbone="resnet18"), CLASSES, 64, 96, weights="out.v2.pth")
    assert torch.equal(before, torch.get_rng_state())
    assert "with_name('out.v2.pth')" in source
    assert loader_name("out.v2.pth") == "load_out.v2.py"
    assert loader_name("student.pth") == "load_student.py"
    assert "nn.BatchNorm2d" not in source  # frozen norms are asked for


def test_a_photo_is_turned_as_its_camera_says(tmp_path, capsys, monkeypatch):
    """As in training: the script prints the same boxes for an image and for its turned copy with an EXIF tag."""
    architecture = Architecture(backbone="resnet18", **SMALL["faster_rcnn"], score_threshold=0.01)
    torch.save(random_detector(CLASSES, architecture, 64, 96).model.state_dict(), tmp_path / "student.pth")
    script = tmp_path / "load_student.py"
    script.write_text(loader_source(architecture, CLASSES, 64, 96), encoding="utf-8")
    noise = torch.randint(256, (60, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    image.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    told = []
    for name in ("upright.png", "lying.png"):
        monkeypatch.setattr("sys.argv", [str(script), str(tmp_path / name)])
        runpy.run_path(str(script), run_name="__main__")
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != ""
