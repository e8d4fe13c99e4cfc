"""COCO mAP: hand-made cases, and modes that come back."""

import pytest
import torch
from pycocotools.coco import COCO
from torch import nn

from defeat_cli.detectors.modes import evaluating
from defeat_cli.engine.evaluation import FIGURES, CocoEvaluator
from defeat_cli.errors import DataError


@pytest.fixture
def coco():
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 7, "width": 100, "height": 100}, {"id": 9, "width": 100, "height": 100}],
        "categories": [{"id": 5, "name": "cat"}, {"id": 12, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 12, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0},
        ],
    }
    truth.createIndex()
    return truth


def output(boxes, labels, scores):
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


def test_perfect_detections_of_one_class_of_two(coco):
    evaluator = CocoEvaluator(coco, ["dog", "cat"])
    evaluator.process(
        [7, 9], [output([[0.0, 0.0, 50.0, 50.0]], [2], [0.9]), output([[0.0, 0.0, 5.0, 5.0]], [2], [0.1])]
    )
    metrics = evaluator.evaluate()
    # cat is found perfectly; dog not at all: AP is the mean over the two classes.
    assert metrics["per_class"] == {"cat": pytest.approx(1.0), "dog": 0.0}
    assert metrics["AP"] == pytest.approx(0.5)
    assert metrics["APs"] == -1  # no small objects
    assert metrics["APm"] == pytest.approx(0.5)
    assert set(metrics) == {*FIGURES, "per_class"}
    assert evaluator.detections[0] == {
        "image_id": 7,
        "category_id": 5,
        "bbox": [0.0, 0.0, 50.0, 50.0],
        "score": pytest.approx(0.9),
    }


def test_an_iou_of_064_counts_at_the_first_three_thresholds(coco):
    evaluator = CocoEvaluator(coco, ["cat"])
    # [0, 0, 50, 32]: IoU 32 / 50 = 0.64 with the ground truth: right at 0.50, 0.55 and 0.60, wrong at the seven above.
    evaluator.process([7], [output([[0.0, 0.0, 50.0, 32.0]], [1], [0.9])])
    metrics = evaluator.evaluate()
    assert metrics["AP"] == pytest.approx(0.3)
    assert metrics["AP50"] == pytest.approx(1.0)
    assert metrics["AP75"] == 0.0


def test_no_detections_score_zero(coco):
    evaluator = CocoEvaluator(coco, ["cat", "dog"])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    evaluator.process([7, 9], [nothing, nothing])
    assert evaluator.evaluate()["AP"] == 0.0


def test_classes_that_the_data_has_not_are_left_out(coco):
    evaluator = CocoEvaluator(coco, ["bird", "cat"])
    evaluator.process([7], [output([[0.0, 0.0, 50.0, 50.0]] * 2, [1, 2], [0.9, 0.8])])
    assert [d["category_id"] for d in evaluator.detections] == [5]


def test_no_shared_class_is_an_error(coco):
    with pytest.raises(DataError, match=r"share no class: the detector knows bird; the data has cat, dog"):
        CocoEvaluator(coco, ["bird"])


def test_modes_come_back_after_an_error():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    module.train()
    module[0].eval()
    seen = []

    def fail():
        with evaluating(module):
            seen.append((module[1].training, torch.is_grad_enabled()))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert seen == [(False, False)]
    assert module[1].training
    assert not module[0].training
    assert torch.is_grad_enabled()


def test_scoring_prints_nothing(coco, capsys):
    evaluator = CocoEvaluator(coco, ["cat"])
    capsys.readouterr()
    evaluator.process([7], [output([[0.0, 0.0, 50.0, 50.0]], [1], [0.9])])
    evaluator.evaluate()
    evaluator.reset()
    evaluator.process([7], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}])
    evaluator.evaluate()
    assert capsys.readouterr().out == ""
