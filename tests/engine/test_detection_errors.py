"""Error types of detections, worked out by hand and by a slow, obvious version."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from oracles import detection_errors as oracle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from defeat_cli.engine.detection_errors import EQUAL_RECALLS, ERROR_TYPES, _scores_at_recalls, error_report
from defeat_cli.errors import DataError

CAT, DOG = 1, 2
LEFT, RIGHT = [0, 0, 100, 100], [1000, 0, 100, 100]  # where objects are, xywh
NEAR_LEFT, NEAR_RIGHT = [50, 0, 100, 100], [1050, 0, 100, 100]  # IoU 5000 / 15000 = 1/3 with them
ON_LEFT = [0, 0, 100, 80]  # IoU 0.8 with LEFT
ELSEWHERE = [500, 500, 40, 40]


def truth(*objects, images=1):
    """Ground truth from (category, box) or (category, box, "crowd") in image 1."""
    annotations = [
        {
            "id": i,
            "image_id": 1,
            "category_id": o[0],
            "bbox": o[1],
            "area": o[1][2] * o[1][3],
            "iscrowd": int(len(o) > 2),
        }
        for i, o in enumerate(objects, start=1)
    ]
    return {
        "images": [{"id": i} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
    }


def found(*detections):
    """Detections from (category, box, score) in image 1."""
    return [{"image_id": 1, "category_id": c, "bbox": box, "score": score} for c, box, score in detections]


def check(report, ap50, **expected):
    """The report's AP50, and count and dAP of the given types; all other types have count 0 and dAP 0."""
    assert report.ap50 == pytest.approx(ap50, abs=1e-12)
    for name in ERROR_TYPES:
        count, dap = expected.get(name, (0, 0))
        assert report.types[name]["count"] == count, name
        assert report.types[name]["dap"] == pytest.approx(dap, abs=1e-12), name


def test_perfect_detections_have_no_errors():
    report = error_report(found((CAT, LEFT, 0.9), (DOG, RIGHT, 0.2)), truth((CAT, LEFT), (DOG, RIGHT)))
    check(report, 1.0)
    assert report.special == {"false_positives": {"dap": 0.0}, "false_negatives": {"dap": 0.0}}


def test_localisation():
    # Precision is 1 up to recall 0.5: 51 of the 101 recalls. Mended, the better of the two makes it 1 throughout, and
    # the other goes, else it would be a second true positive on one object.
    detections = found((CAT, LEFT, 0.9), (CAT, NEAR_RIGHT, 0.8), (CAT, [1000, 50, 100, 100], 0.7))
    report = error_report(detections, truth((CAT, LEFT), (CAT, RIGHT)))
    check(report, 51 / 101, localisation=(2, 50 / 101))


def test_localisation_beside_an_object_that_is_taken_goes():
    # The first false positive halves the precision of all recalls; there is nothing that it could become.
    report = error_report(found((CAT, NEAR_LEFT, 0.9), (CAT, LEFT, 0.8)), truth((CAT, LEFT)))
    check(report, 0.5, localisation=(1, 0.5))


def test_classification():
    # Cats: false at 0.95, true at 0.9, so precision 1/2. Dogs: none found. Mended, both are perfect.
    report = error_report(found((CAT, RIGHT, 0.95), (CAT, LEFT, 0.9)), truth((CAT, LEFT), (DOG, RIGHT)))
    check(report, 0.25, classification=(1, 0.75))


def test_both_and_missed():
    # As above, but the false cat is beside the dog as well: mended it goes (cats 1, dogs 0), and the dog is missed by
    # all. With the dog not asked for, dogs leave the mean: cats' 1/2 remains.
    report = error_report(found((CAT, NEAR_RIGHT, 0.95), (CAT, LEFT, 0.9)), truth((CAT, LEFT), (DOG, RIGHT)))
    check(report, 0.25, both=(1, 0.25), missed=(1, 0.25))


def test_duplicate():
    # Precision is 1 up to recall 0.5 (51 recalls) and 2/3 for the other 50.
    detections = found((CAT, LEFT, 0.9), (CAT, ON_LEFT, 0.8), (CAT, RIGHT, 0.7))
    report = error_report(detections, truth((CAT, LEFT), (CAT, RIGHT)))
    check(report, (51 + 50 * 2 / 3) / 101, duplicate=(1, 50 / 3 / 101))


def test_background_and_its_count_at_a_score():
    # The one at 0.9 halves the precision; the one at 0.2 comes after the last true positive and costs nothing.
    detections = found((CAT, ELSEWHERE, 0.9), (CAT, LEFT, 0.5), (DOG, ELSEWHERE, 0.3), (CAT, ELSEWHERE, 0.2))
    report = error_report(detections, truth((CAT, LEFT), images=4), score=0.3)
    check(report, 0.5, background=(3, 0.5))
    assert report.background_false_positives == {"score": 0.3, "count": 2, "per_image": 0.5}
    assert report.special["false_positives"]["dap"] == pytest.approx(0.5)


def test_background_at_equal_recall():
    # Two objects: one is found from 0.8 on, which lets in the background of 0.9 and 0.8, and both from 0.4 on.
    # Up to 5 .. 50% one object is enough, above it takes two. The wrong one of 0.95 is no background.
    detections = found(
        (CAT, NEAR_LEFT, 0.95), (CAT, ELSEWHERE, 0.9), (CAT, LEFT, 0.8), (DOG, ELSEWHERE, 0.8),
        (DOG, ELSEWHERE, 0.5), (DOG, RIGHT, 0.4), (DOG, ELSEWHERE, 0.3),
    )  # fmt: skip
    report = error_report(detections, truth((CAT, LEFT), (DOG, RIGHT), images=2))
    at = {round(entry["recall"], 2): entry for entry in report.background_at_recall}
    assert list(at) == [round(0.05 * i, 2) for i in range(1, 20)]
    assert at[0.5] == {"recall": 0.5, "score": 0.8, "count": 2, "per_image": 1.0}
    assert at[0.05]["score"] == 0.8
    assert at[0.55] == {"recall": 0.55, "score": 0.4, "count": 3, "per_image": 1.5}


def test_a_recall_that_is_not_reached_has_no_background():
    crowded = truth((CAT, LEFT), (CAT, RIGHT), (CAT, ELSEWHERE, "crowd"))  # a crowd is not asked for
    report = error_report(found((CAT, LEFT, 0.9)), crowded)
    assert report.background_at_recall[-1] == {"recall": 0.5, "score": 0.9, "count": 0, "per_image": 0.0}
    assert error_report([], crowded).background_at_recall == []


def test_missed():
    # Half the objects are found with precision 1: 51 recalls. Asked for that half only: 1.
    report = error_report(found((CAT, LEFT, 0.9)), truth((CAT, LEFT), (CAT, RIGHT)))
    check(report, 51 / 101, missed=(1, 50 / 101))
    assert report.special["false_negatives"]["dap"] == pytest.approx(50 / 101)


def test_false_negatives_count_objects_that_other_errors_cover():
    report = error_report(found((CAT, LEFT, 0.9), (CAT, NEAR_RIGHT, 0.8)), truth((CAT, LEFT), (CAT, RIGHT)))
    assert report.types["missed"] == {"count": 0, "dap": 0}
    assert report.special["false_negatives"]["dap"] == pytest.approx(50 / 101)


@pytest.mark.parametrize(
    ("category", "box", "kind"),
    [
        (CAT, [0, 0, 50, 100], None),  # IoU 0.5 exactly: right
        (CAT, [0, 0, 10, 100], "localisation"),  # 0.1 exactly
        (CAT, [0, 0, 9, 100], "background"),
        (DOG, [0, 0, 50, 100], "classification"),
        (DOG, [0, 0, 10, 100], "both"),
        (DOG, [0, 0, 9, 100], "background"),
    ],
)
def test_thresholds_belong_to_the_interval_above(category, box, kind):
    report = error_report(found((category, box, 0.9)), truth((CAT, LEFT)))
    assert [name for name in ERROR_TYPES if report.types[name]["count"] and name != "missed"] == (
        [kind] if kind else []
    )


def test_localisation_precedes_classification_precedes_duplicate():
    # On a dog, with IoU 1/3 to a cat; then on a dog, with IoU 0.8 to a cat that is taken.
    objects = truth((CAT, LEFT), (DOG, ON_LEFT), (DOG, NEAR_LEFT))
    first = error_report(found((CAT, NEAR_LEFT, 0.9)), objects)
    second = error_report(found((CAT, LEFT, 0.9), (CAT, ON_LEFT, 0.8)), objects)
    assert [first.types[name]["count"] for name in ("classification", "localisation", "duplicate")] == [0, 1, 0]
    assert [second.types[name]["count"] for name in ("classification", "localisation", "duplicate")] == [1, 0, 0]


def test_a_detection_whose_favourite_is_taken_gets_the_next():
    # Both overlap the first object most; the second detection (IoU 80/100 with it) still reaches the other (60/100).
    objects = truth((CAT, LEFT), (CAT, [0, 0, 100, 48]))
    report = error_report(found((CAT, LEFT, 0.9), (CAT, ON_LEFT, 0.8)), objects)
    check(report, 1.0)


def test_crowds_take_their_own_class_only_and_are_not_asked_for():
    # Half of NEAR_LEFT is in the crowd of cats: ignored, any number of times. For a dog the crowd is background.
    objects = truth((CAT, RIGHT), (CAT, LEFT, "crowd"))
    cats = found((CAT, NEAR_LEFT, 0.95), (CAT, LEFT, 0.94), (CAT, RIGHT, 0.9))
    check(error_report(cats, objects), 1.0)
    check(error_report(cats + found((DOG, LEFT, 0.99)), objects), 1.0, background=(1, 0))


def test_a_free_object_goes_before_a_crowd():
    report = error_report(found((CAT, LEFT, 0.9)), truth((CAT, ON_LEFT), (CAT, LEFT, "crowd")))
    check(report, 1.0)


def test_no_detections():
    report = error_report([], truth((CAT, LEFT), (DOG, RIGHT)))
    check(report, 0.0, missed=(2, 1.0))
    assert report.background_false_positives["count"] == 0


def test_detections_after_the_hundredth_of_an_image_and_class_do_not_count():
    background = [(CAT, ELSEWHERE, 0.9)] * 100
    report = error_report(found(*background, (CAT, LEFT, 0.5), (DOG, RIGHT, 0.5)), truth((CAT, LEFT), (DOG, RIGHT)))
    check(report, 0.5, background=(100, 0), missed=(1, 0.5))


def test_unusable_input_is_refused_by_name():
    with pytest.raises(DataError, match="image 7"):
        error_report([{"image_id": 7, "category_id": CAT, "bbox": LEFT, "score": 1}], truth((CAT, LEFT)))
    with pytest.raises(DataError, match="category 5"):
        error_report(found((5, LEFT, 1)), truth((CAT, LEFT)))
    with pytest.raises(DataError, match="no object"):
        error_report([], truth((CAT, LEFT, "crowd")))


def random_set(seed, images=40, classes=4, decimals=2):
    """Objects with crowds, and detections around them with many equal scores."""
    draw = np.random.default_rng(seed)
    content = {
        "images": [{"id": int(i)} for i in draw.permutation(images)],
        "annotations": [],
        "categories": [{"id": 3 * k + 1, "name": str(k)} for k in range(classes + 1)],  # the last has no object
    }
    detections = []
    for image in range(images):
        boxes = np.concatenate([draw.uniform(0, 150, (6, 2)), draw.uniform(20, 90, (6, 2))], axis=1)[: draw.integers(7)]
        labels = 3 * draw.integers(classes, size=len(boxes)) + 1
        for box, label in zip(boxes, labels, strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(draw.random() < 0.15),
                }
            )
        for _ in range(12):
            box, label = [*draw.uniform(0, 200, 2), *draw.uniform(10, 60, 2)], 3 * draw.integers(classes + 1) + 1
            if len(boxes) and draw.random() < 0.8:
                k = draw.integers(len(boxes))
                box = (boxes[k] + draw.normal(0, 8, 4)).clip(5)
                label = labels[k] if draw.random() < 0.8 else label
            score = round(float(draw.random()), decimals)
            detections.append(
                {"image_id": image, "category_id": int(label), "bbox": list(map(float, box)), "score": score}
            )
    return detections, content


def coco_ap50(detections, content):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats[1], coco


@pytest.mark.parametrize("seed", range(5))
def test_ap50_is_that_of_pycocotools(seed):
    detections, content = random_set(seed)
    expected, coco = coco_ap50(detections, content)
    assert 0.1 < expected < 0.9
    assert error_report(detections, content).ap50 == pytest.approx(expected, abs=1e-12)
    assert error_report(detections, coco) == error_report(detections, content)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_definitions_applied_one_by_one(seed):
    detections, content = random_set(seed, decimals=12)
    ap50, counts, dap = oracle.costs(detections, content)
    report = error_report(detections, content)
    assert report.ap50 == pytest.approx(ap50, abs=1e-12)
    assert {name: figures["count"] for name, figures in report.types.items()} == counts
    assert min(counts.values()) > 0
    for name, figures in {**report.types, **report.special}.items():
        assert figures["dap"] == pytest.approx(dap[name], abs=1e-12), name


def test_ids_may_be_strings():
    objects = truth((CAT, LEFT))
    objects["images"], objects["annotations"][0]["image_id"] = [{"id": "a.jpg"}, {"id": "b.jpg"}], "a.jpg"
    detections = [{"image_id": name, "category_id": CAT, "bbox": LEFT, "score": 0.9} for name in ("a.jpg", "b.jpg")]
    check(error_report(detections, objects), 1.0, background=(1, 0))


def test_the_report_goes_through_json():
    report = error_report(found((CAT, LEFT, 0.9), (CAT, ELSEWHERE, 0.8)), truth((CAT, LEFT)))
    content = json.loads(json.dumps(report.to_dict()))
    assert content["types"]["background"]["count"] == 1
    assert set(content) == {"ap50", "types", "special", "background_false_positives", "background_at_recall"}


def test_a_recall_that_is_a_whole_number_of_objects_asks_for_no_more():
    """Of 100 objects 0.55 are 55, though 0.55 · 100 is 55.00000000000001 to a computer."""
    assert 0.55 * 100 > 55
    score = np.arange(100, 0, -1) / 100
    found, findings = SimpleNamespace(score=score), SimpleNamespace(right=np.ones(100, dtype=bool))
    reached = dict(_scores_at_recalls(found, findings, SimpleNamespace(crowd=np.zeros(100, dtype=bool))))
    # With k of them found the lowest score is (101 - k) / 100.
    assert reached == {recall: (101 - round(100 * recall)) / 100 for recall in EQUAL_RECALLS}
