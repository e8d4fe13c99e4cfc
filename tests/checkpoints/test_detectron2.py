"""detectron2's checkpoints: what older files hold beside the weights, and what is refused."""

from __future__ import annotations

import math
import pickle
from random import Random

import numpy as np
import pytest
import torch
import yaml
from oracles.foreign_configs import changed, detectron2_config, mutated
from oracles.foreign_detectors import ForeignDetector

from defeat_cli.checkpoints import detectron2
from defeat_cli.checkpoints import detectron2_config as detectron2_config_reader
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.errors import CheckpointError


@pytest.fixture(scope="module")
def faster_rcnn():
    return ForeignDetector("detectron2", True, backbone="resnet18", fpn=8, head=8, classes=2).weights


@pytest.fixture(scope="module")
def retinanet():
    return ForeignDetector("detectron2", False, backbone="resnet18", fpn=8, classes=2).weights


def load(path, weights):
    torch.save({"model": weights, "iteration": 89999, "optimizer": {}}, path / "model_final.pth")
    return load_weights(path / "model_final.pth")


def cell(sizes, ratios):
    sides = [(s / math.sqrt(r), s * math.sqrt(r)) for s in sizes for r in ratios]
    return torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in sides])


def test_a_zoo_pickle_of_numpy_arrays(tmp_path, faster_rcnn):
    arrays = {key: value.numpy() for key, value in faster_rcnn.items()}
    (tmp_path / "model_final_280758.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Model Zoo"}, 2))
    weights = load_weights(tmp_path / "model_final_280758.pkl")
    plain = load(tmp_path, faster_rcnn)
    assert weights.state_dict.keys() == plain.state_dict.keys()
    assert all(torch.equal(weights.state_dict[key], value) for key, value in plain.state_dict.items())


def test_anchors_in_the_file_are_kept(tmp_path, retinanet):
    sizes = [[16 * 2**level, 20 * 2**level, 26 * 2**level] for level in range(5)]
    cells = {f"anchor_generator.cell_anchors.{i}": cell(level, [0.5, 1 / 3, 3.0]) for i, level in enumerate(sizes)}
    built = load(tmp_path, {**retinanet, **cells}).architecture
    assert [pytest.approx(level, rel=1e-5) for level in sizes] == built.anchor_sizes
    assert built.anchor_ratios == pytest.approx([0.5, 1 / 3, 3.0], abs=1e-5)
    assert built.conventions.anchor_order == "sizes-first"


def test_anchors_that_are_no_product_are_refused(tmp_path, retinanet):
    cells = {f"anchor_generator.cell_anchors.{i}": cell([32.0], [0.5, 1.0, 2.0]) + 8 for i in range(5)}
    with pytest.raises(CheckpointError, match=r"cell_anchors\.0: anchors that are no product"):
        load(tmp_path, {**retinanet, **cells})


def test_the_default_anchors(tmp_path, faster_rcnn, retinanet):
    assert load(tmp_path, faster_rcnn).architecture.anchor_sizes == [[32.0], [64.0], [128.0], [256.0], [512.0]]
    assert load(tmp_path, retinanet).architecture.anchor_sizes[0] == pytest.approx([32, 40.3174736, 50.7968337])


def test_pixel_statistics_in_the_file_are_kept(tmp_path, faster_rcnn):
    mean, std = torch.tensor([103.53, 116.28, 123.675]), torch.tensor([57.375, 57.12, 58.395])
    pixels = {"pixel_mean": mean.view(3, 1, 1), "pixel_std": std.view(3, 1, 1)}
    weights = load(tmp_path, {**faster_rcnn, **pixels})
    assert weights.architecture.conventions.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert weights.architecture.conventions.image_std == pytest.approx([0.229, 0.224, 0.225])
    stem = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(weights.state_dict["backbone.body.conv1.weight"], faster_rcnn[stem].flip(1))


def test_a_model_trained_on_rgb_keeps_its_first_convolution(tmp_path, faster_rcnn):
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    weights = load(tmp_path, {**faster_rcnn, "pixel_mean": mean, "pixel_std": std})
    stem = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(weights.state_dict["backbone.body.conv1.weight"], faster_rcnn[stem])
    assert weights.architecture.conventions.image_std == pytest.approx([0.229, 0.224, 0.225])


def read(folder, weights, config):
    """What a checkpoint is read as beside this `config.yaml`: a text, or values."""
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return detectron2.to_weights({"model": weights}, str(folder / "model_final.pth"))


@pytest.fixture(scope="module")
def original():
    return ForeignDetector("detectron2", True, backbone="resnet18", fpn=8, head=8, classes=2)


def test_the_configuration_beside_it_says_what_the_network_takes(tmp_path):
    """A model of torchvision's ResNet, trained on RGB: today's `.pth` files hold no pixel mean."""
    weights = ForeignDetector("detectron2", True, fpn=8, head=8, classes=2).weights
    rgb = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.RESNETS.STRIDE_IN_1X1": False}
    config = detectron2_config(ForeignDetector("detectron2", True, backbone="resnet18", fpn=8, head=8))
    found = read(tmp_path, weights, changed(config, {**rgb, "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}))
    conventions = found.architecture.conventions
    assert conventions.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert conventions.image_std == pytest.approx([0.229, 0.224, 0.225])
    assert not conventions.stride_in_1x1
    stem = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(found.state_dict["backbone.body.conv1.weight"], weights[stem])
    assert any(note.endswith(f"{tmp_path / 'config.yaml'}") for note in found.notes)
    assert found.stated
    assert found.assumptions == []


def test_sizes_and_texts_that_stand_for_tuples(tmp_path, faster_rcnn, original):
    changes = {
        "INPUT.MIN_SIZE_TEST": 640,
        "INPUT.MAX_SIZE_TEST": 1000,
        "MODEL.RPN.BBOX_REG_WEIGHTS": "(1.0, 1.0, 1.0, 1.0)",
    }
    found = read(tmp_path, faster_rcnn, changed(detectron2_config(original), changes))
    assert (found.short_side, found.long_side) == (640, 1000)


def test_what_a_configuration_leaves_out_is_detectron2s_default(tmp_path, faster_rcnn, original):
    """6000 proposals of each level, where the model zoo's base file says 1000."""
    config = detectron2_config(original)
    del config["MODEL"]["RPN"]["PRE_NMS_TOPK_TEST"]
    del config["MODEL"]["RESNETS"], config["INPUT"], config["TEST"]
    assert read(tmp_path, faster_rcnn, config).architecture.proposals_before_nms == 6000


def test_one_list_of_anchors_is_for_all_levels(tmp_path, retinanet):
    config = detectron2_config(ForeignDetector("detectron2", False, backbone="resnet18", fpn=8))
    config = changed(config, {"MODEL.ANCHOR_GENERATOR.SIZES": [[8, 16, 32]]})
    assert read(tmp_path, retinanet, config).architecture.anchor_sizes == [[8.0, 16.0, 32.0]] * 5


@pytest.mark.parametrize("weights", ["faster_rcnn", "retinanet"])
def test_without_a_configuration_each_assumption_is_a_note(tmp_path, request, weights):
    found = load(tmp_path, request.getfixturevalue(weights))
    assert len(found.assumptions) == 2
    assert all(line.startswith("assumed, for there is no config.yaml") for line in found.assumptions)
    for part in ("BGR pixels, red to blue less [123.675, 116.28, 103.53]", "800 pixels, 1333 at most"):
        assert part in "\n".join(found.assumptions)
    assert not found.stated


def test_a_file_of_another_tool_beside_it_is_left_alone_aloud(tmp_path, faster_rcnn):
    assumed = read(tmp_path, faster_rcnn, "data:\n  path: images\n").assumptions
    assert "config.yaml is no configuration of detectron2's, and was not read" in assumed[0]
    assert len(assumed) == 3


REFUSED_SETTINGS = {
    "MODEL.META_ARCHITECTURE": "PanopticFPN",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True],
    "MODEL.RESNETS.RADIX": 2,
    "MODEL.FPN.FUSE_TYPE": "avg",
    "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64]],
    "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
    "MODEL.RPN.NMS_THRESH": "high",
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": -1,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 0.0, 5.0],
    "MODEL.PIXEL_MEAN": [1.0],
    "INPUT.FORMAT": "YUV-BT.601",
    "INPUT.MIN_SIZE_TEST": 0,
    "TEST.SOFT_NMS": True,
    "MODEL.FCOS": {"NMS_TH": 0.6},
}


@pytest.mark.parametrize(("path", "value"), REFUSED_SETTINGS.items())
def test_a_setting_that_is_not_understood_is_refused_by_name(tmp_path, faster_rcnn, original, path, value):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, faster_rcnn, changed(detectron2_config(original), {path: value}))
    first, *problems = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'config.yaml'}: a detector that cannot be represented here:"
    assert len(problems) == 1
    assert problems[0].strip().startswith(path.removesuffix(".SIZES"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MODEL:\n  RPN: [", r"cannot be read \(line 2\)"),
        ("MODEL:\n  SIZES: !!python/object/apply:eval ['[1]']", r"cannot be read \(line 2\)"),
        ("_BASE_: ../Base-RCNN-FPN.yaml\nMODEL:\n  MASK_ON: false", r"takes settings from another file \(_BASE_\)"),
        ("model:\n  _target_: detectron2.modeling.GeneralizedRCNN", "is a LazyConfig"),
        ("MODEL: 3", "MODEL = 3"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_not_taken_for_none(tmp_path, faster_rcnn, text, said):
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path, faster_rcnn, text)


def test_no_configuration_gives_a_traceback(original):
    random = Random(0)
    outcomes = []
    for two_stage in (True, False):
        whole = detectron2_config(original if two_stage else ForeignDetector("detectron2", False, backbone="resnet18"))
        for _ in range(300):
            try:
                detectron2_config_reader.read(
                    mutated(whole, random, ["MODEL", "MODEL", "INPUT", "TEST"]), two_stage, "it"
                )
                outcomes.append(None)
            except CheckpointError as error:
                outcomes.append(str(error))
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert all(message.startswith("it: ") for message in refused)
    assert 150 < len(refused) < 550


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("roi_heads.box_head.0.fc1.weight", "Cascade R-CNN's several box heads"),
        ("roi_heads.mask_head.mask_fcn1.weight", "a mask head"),
        ("roi_heads.keypoint_head.conv_fcn1.weight", "a keypoint head"),
        ("roi_heads.box_head.conv1.weight", "a box head with convolutions"),
        ("backbone.bottom_up.res3.0.conv2_offset.weight", "deformable convolutions"),
        ("backbone.fpn_lateral2.norm.weight", "a normalised FPN"),
        ("backbone.res4.0.conv1.weight", "a backbone without FPN"),
        ("backbone.bottom_up.stem.conv1_1.weight", "a backbone that is no plain ResNet"),
        ("sem_seg_head.p2.0.weight", "a segmentation head"),
        ("something.weight", "an unknown part"),
    ],
)
def test_parts_that_cannot_be_represented_are_refused_by_name(tmp_path, faster_rcnn, key, said):
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, {**faster_rcnn, key: torch.ones(1)})
    assert said in str(caught.value)
    assert key in str(caught.value)


def test_detectron_1_is_refused(tmp_path):
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": np.ones(1)}}, protocol=2))
    with pytest.raises(CheckpointError, match="Detectron 1"):
        load_weights(tmp_path / "model_final.pkl")
