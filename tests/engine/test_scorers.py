"""The faster scorer finds what pycocotools finds, to the last bit."""

import sys

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from defeat_cli.engine import scorers
from defeat_cli.engine.evaluation import CocoEvaluator


def crowded_truth_and_detections(seed, images=12, classes=3):
    """Objects of all sizes, some of them crowds; detections near them and anywhere, equal scores and empty images."""
    rng = np.random.default_rng(seed)
    truth, found = [], {}
    for image in range(1, images + 1):
        boxes, labels, scores = [], [], []
        for _ in range(rng.integers(0, 9)):
            x, y, w, h = *(rng.random(2) * 300), *np.exp(rng.random(2) * 5 + 0.5)
            label = int(rng.integers(1, classes + 1))
            truth.append(
                {
                    "id": len(truth) + 1, "image_id": image, "category_id": label, "bbox": [x, y, w, h],
                    "area": w * h, "iscrowd": int(rng.random() < 0.1),
                }
            )  # fmt: skip
            for _ in range(rng.integers(0, 4)):
                a, b, c, d = rng.normal(size=4) * 0.08 * min(w, h)
                boxes.append([x + a, y + b, x + a + max(1, w + c), y + b + max(1, h + d)])
                labels.append(label if rng.random() < 0.9 else 1)
                scores.append(round(rng.random(), 1))
        found[image] = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores, dtype=torch.float32),
        }
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image, "width": 400, "height": 400} for image in found],
        "categories": [{"id": label, "name": f"class {label}"} for label in range(1, classes + 2)],
        "annotations": truth,
    }
    coco.createIndex()
    return coco, found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_the_faster_scorer_finds_the_same(monkeypatch, seed, share):
    """Of all images or some of them, with few detections or none; one class has no objects."""
    pytest.importorskip("faster_coco_eval")
    coco, found = crowded_truth_and_detections(seed)
    found = {image: {k: v[: round(share * len(v))] for k, v in outputs.items()} for image, outputs in found.items()}
    figures = []
    for kind in (None, scorers.faster_kind()):
        monkeypatch.setattr(scorers, "faster_kind", lambda kind=kind: kind)
        evaluator = CocoEvaluator(coco, [f"class {label}" for label in range(1, 5)])
        for image in list(found)[seed:]:
            evaluator.process([image], [found[image]])
        figures.append(evaluator.evaluate())
    plain, faster = figures
    assert list(plain) == list(faster)
    assert plain == faster
    assert plain["per_class"]["class 4"] == -1
    assert (plain["AP"] > 0.05) == (share > 0)


def one_class(objects, right):
    """One image a detection, scores falling: `right` says which detections find one of so many objects."""
    coco = COCO()
    images = range(1, max(objects, len(right)) + 1)
    box = [10.0, 10.0, 50.0, 50.0]
    coco.dataset = {
        "images": [{"id": image, "width": 100, "height": 100} for image in images],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": 2500, "iscrowd": 0}
            for i in range(1, objects + 1)
        ],
    }
    coco.createIndex()
    detections = [
        {
            "image_id": image, "category_id": 1, "bbox": box if found else [0.0, 0.0, 5.0, 5.0],
            "score": 1 - image / (len(right) + 1),
        }
        for image, found in enumerate(right, start=1)
    ]  # fmt: skip
    return coco, coco.loadRes(detections), images


@pytest.mark.parametrize("objects", [1, 3, 99, 100, 101, 250])
@pytest.mark.parametrize("right", ["1", "10", "110", "11", "101", "0111", "1011"])
def test_a_lone_right_detection_has_pycocotools_precision(monkeypatch, objects, right):
    """The one rounding in which the libraries differ; at 101 objects two recalls lie between the usual thresholds."""
    pytest.importorskip("faster_coco_eval")
    right = [found == "1" for found in right]
    faster = scorers.score(*one_class(objects, right))
    monkeypatch.setattr(scorers, "faster_kind", lambda: None)
    plain = scorers.score(*one_class(objects, right))
    assert np.array_equal(plain.stats, faster.stats)
    assert np.array_equal(plain.eval["precision"], faster.eval["precision"])
    assert np.array_equal(plain.eval["recall"], faster.eval["recall"])


def test_a_package_that_is_not_there_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # importing it raises ImportError
    assert scorers.faster_kind() is None
    assert scorers.score(*one_class(2, [True])).stats[0] == pytest.approx(51 / 101)  # of recalls from 0 to 0.5
