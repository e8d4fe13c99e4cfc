"""detectron2's checkpoints: what older files hold beside the weights, and what is refused."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from oracles.foreign_detectors import ForeignDetector

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
