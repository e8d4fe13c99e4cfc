"""One way from every format to a detector: what is said is in force, the rest is the checkpoint's own."""

from __future__ import annotations

import pickle

import pytest
import torch
from oracles.foreign_detectors import ForeignDetector
from torchvision.models import detection

from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.config.architecture import Architecture
from defeat_cli.config.given import COMMAND_LINE, given_settings
from defeat_cli.detectors.loading import load_detector, load_teacher
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError, RecipeError


def mmdet(path):
    torch.save({"state_dict": ForeignDetector("mmdet", True, backbone="resnet18").weights, "meta": {}}, path)


def detectron2(path):
    arrays = {
        key: value.numpy() for key, value in ForeignDetector("detectron2", True, backbone="resnet50").weights.items()
    }
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol=2))


def torchvision(path):
    torch.save(
        build_detector(
            Architecture(backbone="resnet18", fpn_channels=16, head_channels=16), ["a", "b"], [96], 96
        ).model.state_dict(),
        path,
    )


SAID = {
    "score_threshold": 0.3,
    "detections_per_image": 7,
    "anchor_sizes": [[9], [18], [36], [72], [99]],
    "conventions": {"image_mean": [0.1, 0.2, 0.3], "roi_align_aligned": True, "edge_cases": "detectron2"},
}


@pytest.mark.parametrize(
    ("write", "section"), [(mmdet, "student"), (detectron2, "student"), (torchvision, "teacher.architecture")]
)
def test_what_is_said_is_in_force_for_every_format(tmp_path, write, section):
    path = tmp_path / "model.pth"
    write(path)
    own = load_weights(path).architecture
    loaded = load_detector(str(path), given_settings(SAID, "r.yaml", f"{section}."), section=section)
    model, found = loaded.detector.model, loaded.meaning.architecture
    assert (model.roi_heads.score_thresh, model.roi_heads.detections_per_img) == (0.3, 7)
    assert model.transform.image_mean == [0.1, 0.2, 0.3]
    assert model.roi_heads.box_roi_pool.aligned
    assert [list(level) for level in model.rpn.anchor_generator.sizes] == SAID["anchor_sizes"]
    assert found.conventions.edge_cases == "detectron2"
    # What is not said stays.
    assert (found.nms_threshold, found.conventions.image_std) == (own.nms_threshold, own.conventions.image_std)
    assert found.conventions.batch_norm_eps == own.conventions.batch_norm_eps
    (told,) = [note for note in loaded.notes if note.startswith("in force")]
    for name in ("score_threshold", "detections_per_image", "anchor_sizes", "conventions.image_mean"):
        assert f"{section}.{name}" in told
    assert "r.yaml" in told


def test_torchvisions_own_weights_obey_too(monkeypatch):
    model = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: model.state_dict())
    said = {"student": {"nms_threshold": 0.4}, "data": {"short_side": [480, 320], "long_side": 500}}
    loaded = load_detector("torchvision:fcos_resnet50_fpn", given_settings(said, COMMAND_LINE))
    found = loaded.detector.model
    assert (found.score_thresh, found.nms_thresh, found.detections_per_img) == (0.2, 0.4, 100)
    assert (found.transform.min_size, found.transform.max_size) == ((320,), 500)
    with pytest.raises(RecipeError, match=r"student\.anchor_ratios \[1\.0\] .*without effect"):
        load_detector("torchvision:fcos_resnet50_fpn", given_settings({"student.anchor_ratios": [1.0]}, COMMAND_LINE))
    other = given_settings({"student.detector": "retinanet_resnet50_fpn"}, COMMAND_LINE)
    with pytest.raises(CheckpointError, match=r"student\.detector 'retinanet_resnet50_fpn'"):
        load_detector("torchvision:fcos_resnet50_fpn", other)


def test_a_section_is_not_taken_for_another(tmp_path):
    torchvision(tmp_path / "x.pth")
    given = given_settings({"student.score_threshold": 0.3, "data.short_side": [64]}, COMMAND_LINE)
    teacher = load_detector(str(tmp_path / "x.pth"), given, section="teacher.architecture").meaning
    assert (teacher.architecture.score_threshold, teacher.short_side) == (0.05, 800)


def test_a_teachers_size_is_the_recipes_where_nothing_else_says_it_and_that_is_said(tmp_path):
    torchvision(tmp_path / "x.pth")
    said = {"score_threshold": 0.3, "regions_per_image": 64}
    loaded = load_teacher(str(tmp_path / "x.pth"), said, classes=["cat", "dog"], sizes=(96, 128))
    assert (loaded.meaning.short_side, loaded.meaning.long_side) == (96, 128)
    assert loaded.detector.model.roi_heads.fg_bg_sampler.batch_size_per_image == 64
    assumed = " ".join(loaded.assumptions)
    assert "short_side 96, long_side 128" in assumed
    assert "score_threshold" not in assumed
    with pytest.raises(RecipeError, match=r"teacher\.architecture\.proposals_train 7 .*without effect"):
        load_teacher(str(tmp_path / "x.pth"), {"proposals_train": 7}, classes=["cat", "dog"], sizes=(96, 128))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"student.score_threshold": 2}, r"student\.score_threshold 2 \(the command line\)"),
        ({"student.conventions.image_mean": [1]}, r"student\.conventions\.image_mean \[1\] "),
        ({"student.detections_per_image": "many"}, r"student\.detections_per_image 'many'"),
    ],
)
def test_a_value_that_no_detector_can_have_is_refused_by_name(tmp_path, said, told):
    torchvision(tmp_path / "x.pth")
    with pytest.raises(RecipeError, match=told):
        load_detector(str(tmp_path / "x.pth"), given_settings(said, COMMAND_LINE))
