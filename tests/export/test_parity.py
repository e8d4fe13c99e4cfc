"""Matching detections one to one, by hand."""

import pytest
import torch

from defeat_cli.export.parity import compare


def detections(*rows):
    """(x1, score, label) each; boxes of 10 x 10 pixels."""
    boxes = [[float(x), 0.0, float(x) + 10, 10.0] for x, _, _ in rows]
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "scores": torch.tensor([score for _, score, _ in rows]),
        "labels": torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    }


OURS = detections((0, 0.9, 1), (20, 0.8, 2))


@pytest.mark.parametrize(
    ("theirs", "unmatched"),
    [
        (detections((0, 0.9, 1), (20, 0.8, 2)), 0),
        (detections((20, 0.8, 2), (0, 0.9, 1)), 0),  # another order
        (detections((0.4, 0.9005, 1), (20, 0.8, 2)), 0),  # within the tolerances
        (detections((0.6, 0.9, 1), (20, 0.8, 2)), 2),  # a box 0.6 pixels off: one of ours, one of theirs
        (detections((0, 0.902, 1), (20, 0.8, 2)), 2),
        (detections((0, 0.9, 2), (20, 0.8, 2)), 2),
        (detections((0, 0.9, 1)), 1),
        (detections((0, 0.9, 1), (20, 0.8, 2), (20, 0.8, 2)), 1),  # each counts once
        (detections(), 2),
    ],
)
def test_what_belongs_together(theirs, unmatched):
    for one, other in ((OURS, theirs), (theirs, OURS)):
        comparison = compare(one, other, 0.05, 100)
        assert comparison.unmatched == unmatched
        assert comparison.agrees is (unmatched == 0)


def test_the_differences_are_those_of_the_pairs():
    comparison = compare(OURS, detections((0.25, 0.9, 1), (20, 0.8005, 2)), 0.05, 100)
    assert comparison.box == pytest.approx(0.25)
    assert comparison.score == pytest.approx(5e-4, abs=1e-6)
    assert comparison.counts == (2, 2)


def test_the_nearest_of_several_is_taken():
    """Ours at 0 could take either of theirs; only if it takes the one at 0.1 has ours at 0.5 a partner."""
    comparison = compare(detections((0, 0.9, 1), (0.5, 0.9, 1)), detections((0.1, 0.9, 1), (0.45, 0.9, 1)), 0.05, 100)
    assert comparison.unmatched == 0
    assert comparison.box == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(("score", "agrees"), [(0.0505, True), (0.06, False)])
def test_one_more_at_the_threshold_is_no_difference(score, agrees):
    comparison = compare(OURS, detections((0, 0.9, 1), (20, 0.8, 2), (50, score, 1)), 0.05, 100)
    assert (comparison.unmatched, comparison.agrees) == (1, agrees)


def test_the_last_that_is_kept_may_be_another():
    theirs = detections((0, 0.9, 1), (50, 0.8002, 1))
    assert compare(OURS, theirs, 0.05, most=2).agrees
    assert not compare(OURS, theirs, 0.05, most=3).agrees
