"""Mixed pairs through the real command: families, strides and classes that differ, and what is said of them."""

import pytest
from runs import metrics, setting
from tiny import options

TERMS = {
    "faster_rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"},
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
}
NECK, HEAD = {"neck_fg", "neck_bg"}, {"head_fg", "head_bg"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, defeat, tiny):
    """One trained teacher of each family."""
    folders = {}
    for family in TERMS:
        folders[family] = tmp_path_factory.mktemp("teachers") / family
        wider = setting(schedule__epochs=1, student__widths=[8, 16, 16, 16])
        defeat("train", "-r", tiny, "-o", folders[family], *options(family), *wider)
    return {family: folder / "best.pt" for family, folder in folders.items()}


def distil(defeat, tiny, teacher, family, folder, *more):
    output = defeat("train", "-r", tiny, "-t", teacher, "-o", folder, *options(family), *more)
    return output, set(metrics(folder, "train")[0]["weighted"])


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_a_one_stage_pair_has_neck_and_head(defeat, tiny, teachers, family, tmp_path):
    output, terms = distil(defeat, tiny, teachers[family], family, tmp_path / "run")
    assert terms == TERMS[family] | NECK | HEAD
    assert "head distillation" not in output
    assert "AP50" in defeat("eval", tmp_path / "run" / "student.pth")


@pytest.mark.parametrize(
    ("teacher", "student"), [("faster_rcnn", "retinanet"), ("retinanet", "faster_rcnn"), ("faster_rcnn", "fcos")]
)
def test_families_that_differ_share_the_neck_and_say_why(defeat, tiny, teachers, teacher, student, tmp_path):
    output, terms = distil(defeat, tiny, teachers[teacher], student, tmp_path / "run")
    assert terms == TERMS[student] | NECK
    assert "head distillation is off: one detector classifies proposals, the other anchors" in output
    left_out = "[4]" if student == "faster_rcnn" else "[128]"
    assert f"student levels of strides {left_out} have no partner" in output


def test_one_stage_families_that_differ_share_the_neck(defeat, tiny, teachers, tmp_path):
    output, terms = distil(defeat, tiny, teachers["retinanet"], "fcos", tmp_path / "run")
    assert terms == TERMS["fcos"] | NECK
    assert "one-stage detectors of different kinds" in output


def test_retinanets_with_other_anchors_share_the_neck(defeat, tiny, teachers, tmp_path):
    other = ["--set", "student.anchor_ratios=[0.2, 1.0, 5.0]"]
    output, terms = distil(defeat, tiny, teachers["retinanet"], "retinanet", tmp_path / "run", *other)
    assert terms == TERMS["retinanet"] | NECK
    assert "different anchors" in output


def test_fine_grained_masks_are_refused_without_anchors(defeat, tiny, teachers, tmp_path):
    arguments = ["-r", tiny, "-t", teachers["fcos"], *options("fcos"), "--variant", "fine-grained"]
    output = defeat("train", *arguments, "-o", tmp_path / "run", code=2)
    assert "fine-grained" in output
    assert "no anchors" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["gaussian", "head-all", "head-fg", "defeat+backbone"])
def test_variants_work_for_one_stage_detectors(defeat, tiny, teachers, variant, tmp_path):
    _, terms = distil(
        defeat, tiny, teachers["retinanet"], "retinanet", tmp_path / "run", "--variant", variant,
        "--set", "schedule.epochs=1",
    )  # fmt: skip
    expected = {
        "gaussian": {"neck_fg"},
        "head-all": {"head_all"},
        "head-fg": {"head_fg"},
        "defeat+backbone": NECK | HEAD | {"backbone_fg", "backbone_bg"},
    }
    assert terms == TERMS["retinanet"] | expected[variant]


def test_a_class_map_names_pairs(defeat, tiny, teachers, tmp_path):
    output, _ = distil(
        defeat, tiny, teachers["faster_rcnn"], "faster_rcnn", tmp_path / "run",
        "--set", "distillation.class_map={circle: ring, ring: circle}",
    )  # fmt: skip
    assert "head distillation" not in output
    message = defeat(
        "train", "-r", tiny, "-t", teachers["faster_rcnn"], "-o", tmp_path / "no",
        "--set", "distillation.class_map={circel: ring}", code=2,
    )  # fmt: skip
    assert "circel" in message
    assert "did you mean circle?" in message
