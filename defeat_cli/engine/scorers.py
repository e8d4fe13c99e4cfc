"""What scores detections: pycocotools, or faster-coco-eval where it is installed, with the same bits as figures."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def score(truth: COCO, results: COCO, image_ids: Collection[int]) -> COCOeval:
    """A scorer of boxes that has evaluated, accumulated and summarised: `stats` and `eval` hold what it found.

    Args:
        image_ids: the images that count.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        kind = faster_kind()
        scorer = (kind or COCOeval)(truth, results, "bbox")
        scorer.params.imgIds = sorted(set(image_ids))
        if kind is None:
            scorer.evaluate()
            scorer.accumulate()
        else:
            _evaluate_exactly(scorer)
        COCOeval.summarize(scorer)
    return scorer


def faster_kind() -> type | None:
    """faster-coco-eval's class, where the package is there."""
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        return None
    return COCOeval_faster


def _evaluate_exactly(scorer: COCOeval) -> None:
    """Evaluate and accumulate by faster-coco-eval, to pycocotools' bits.

    The two differ in one rounding. pycocotools divides right detections by all detections plus 2.2e-16, which changes
    the quotient only where there is one detection: a curve that begins with a right one has there not quite the
    precision 1. It shows where no later point of the curve, whose precisions are made to fall, is 1 again: where the
    second right detection is not the second of all. Asked for at a recall between one object and two, the curve tells.
    """
    usual, objects = scorer.params.recThrs, _objects(scorer)
    counts = np.unique(objects[objects > 0])
    scorer.params.recThrs = np.concatenate([usual, 1.5 / counts])
    scorer.evaluate()
    scorer.accumulate()
    precision = scorer.eval["precision"]  # IoU x recall x class x area x detections an image
    places = len(usual) + np.searchsorted(counts, objects)  # class x area
    at_two = np.full_like(precision[:, 0], -1.0)
    for k, a in np.argwhere(objects > 0):
        at_two[:, k, a] = precision[:, places[k, a], k, a]
    precision = precision[:, : len(usual)].copy()
    precision[(precision == 1) & (at_two < 1)[:, None]] = 1 / (1 + np.spacing(1))
    scorer.params.recThrs, scorer.eval["precision"] = usual, precision


def _objects(scorer: COCOeval) -> np.ndarray:
    """How many objects there are to find, by class and range of areas."""
    params = scorer.params
    place = {category: k for k, category in enumerate(np.unique(params.catIds))}
    objects = np.zeros((len(place), len(params.areaRng)), dtype=np.int64)
    for annotation in scorer.cocoGt.loadAnns(scorer.cocoGt.getAnnIds(imgIds=params.imgIds)):
        if not annotation.get("iscrowd"):
            for a, (low, high) in enumerate(params.areaRng):
                objects[place[annotation["category_id"]], a] += low <= annotation["area"] <= high
    return objects
