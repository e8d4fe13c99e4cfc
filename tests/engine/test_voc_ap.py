"""VOC's average precision by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from defeat_cli.engine.voc_ap import average_precision, voc_ap50


def truth(*rows: tuple[int, list[float], int]) -> dict[str, Any]:
    return {
        "categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}],
        "annotations": [
            {"image_id": image, "category_id": 1, "bbox": box, "iscrowd": difficult} for image, box, difficult in rows
        ],
    }


def found(image: int, box: list[float], score: float, category: int = 1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


BOX, FAR = [0, 0, 10, 10], [50, 50, 10, 10]


def test_average_precision_by_hand() -> None:
    # Right, wrong, right, right of 4 boxes: precision 1, 1/2, 2/3, 3/4 at recall 1/4, 1/4, 2/4, 3/4.
    correct = np.array([True, False, True, True])
    # Best precision from a recall on: 1 up to 1/4, then 3/4 up to 3/4, then 0.
    assert average_precision(correct, 4, eleven_points=False) == pytest.approx(0.25 * 1 + 0.5 * 0.75)
    # Recall 0, .1, .2 -> 1; .3 to .7 -> 3/4; .8, .9, 1 -> 0.
    assert average_precision(correct, 4, eleven_points=True) == pytest.approx((3 * 1 + 5 * 0.75) / 11)
    assert average_precision(np.zeros(0, dtype=bool), 4, eleven_points=False) == 0
    assert average_precision(np.zeros(0, dtype=bool), 4, eleven_points=True) == 0


@pytest.mark.parametrize("positives", [10, 5, 20, 100])
def test_perfect_detection_has_ap_1(positives: int) -> None:
    for eleven_points in (True, False):
        assert average_precision(np.ones(positives, dtype=bool), positives, eleven_points) == pytest.approx(1)


@pytest.mark.parametrize("eleven_points", [True, False])
def test_a_second_detection_of_a_box_is_wrong(eleven_points: bool) -> None:
    detections = [found(1, BOX, 0.9), found(1, BOX, 0.8), found(1, FAR, 0.7)]
    result = voc_ap50(detections, truth((1, BOX, 0), (1, FAR, 0)), eleven_points)
    # Right, wrong, right: precision 1 at recall 1/2, then 2/3 at recall 1.
    expected = (6 * 1 + 5 * 2 / 3) / 11 if eleven_points else (1 + 2 / 3) / 2
    assert result["AP50"] == result["per_class"]["a"] == pytest.approx(expected)
    assert result["per_class"] == {"a": result["AP50"], "b": -1.0}


def test_difficult_boxes_neither_help_nor_hurt() -> None:
    detections = [found(1, FAR, 0.9), found(1, FAR, 0.8), found(1, BOX, 0.7)]
    assert voc_ap50(detections, truth((1, BOX, 0), (1, FAR, 1)))["AP50"] == 1
    assert voc_ap50(detections, truth((1, FAR, 1)))["AP50"] == -1


def test_scores_order_detections_across_images() -> None:
    detections = [found(1, BOX, 0.3), found(2, FAR, 0.6), found(3, BOX, 0.9)]
    # In order: wrong (image 3 has no box), right, right: precision 0, 1/2, 2/3; best from recall 1/2 on is 2/3.
    assert voc_ap50(detections, truth((1, BOX, 0), (2, FAR, 0)))["AP50"] == pytest.approx(2 / 3)


def test_iou_of_exactly_a_half_is_right() -> None:
    assert voc_ap50([found(1, [0, 0, 10, 5], 0.5)], truth((1, BOX, 0)))["AP50"] == 1
    assert voc_ap50([found(1, [0, 0, 10, 4.99], 0.5)], truth((1, BOX, 0)))["AP50"] == 0


def test_a_detection_belongs_to_the_box_it_overlaps_most() -> None:
    # The second detection overlaps the taken box most, so it is wrong, though IoU with the other is above a half too.
    near = [2, 0, 10, 10]
    detections = [found(1, BOX, 0.9), found(1, [0.5, 0, 10, 10], 0.8)]
    assert voc_ap50(detections, truth((1, BOX, 0), (1, near, 0)))["AP50"] == pytest.approx(0.5)


def test_other_classes_do_not_mix() -> None:
    assert voc_ap50([found(1, BOX, 0.9, category=2)], truth((1, BOX, 0)))["AP50"] == 0
    assert voc_ap50([], truth((1, BOX, 0)))["AP50"] == 0
