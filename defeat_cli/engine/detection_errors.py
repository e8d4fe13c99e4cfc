"""Why a detector loses average precision: the error types of TIDE, and the background false positives.

TIDE (Bolya, Foley, Hays, Hoffman: "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020) gives
each false positive one type, by its IoU with the objects of its own class and of others, with t_f = 0.5, t_b = 0.1:

    localisation    right class, t_b <= IoU < t_f
    classification  wrong class, IoU >= t_f
    duplicate       right class, IoU >= t_f, but a detection with a higher score has taken the object
    background      IoU < t_b with every object
    both            the rest: wrong class, t_b <= IoU < t_f
    missed          an object that none has taken and that no localisation or classification error points at

The first that applies counts, in this order (that of the authors' tool). An error points at the object that it overlaps
most. What a type costs (`dap`) is the AP50 gained when an oracle mends the errors of that type and nothing else:

    localisation, classification   the detection becomes a true positive of the object it points at; where several point
                                   at one object the highest score does and the others go; all go where it is taken
    duplicate, background, both    the detection goes
    missed                         the objects are no longer asked for

and, over all types, `false_positives`: every false positive goes; `false_negatives`: only the objects found are asked
for. The gains do not add up to 1 - AP50, since one error can hide another.

Matching is COCO's at IoU 0.5: a crowd takes any number of detections of its class, which then count neither as right
nor as wrong, and `ap50` is pycocotools' AP50 (all areas, 100 detections an image and class). A class of which no object
is asked for has no AP and leaves the mean; where no class is left nothing is missing, and AP50 is 1.

The authors' own tool, tidecv, was last released in 2020 and brings OpenCV, pandas and seaborn along. Its figures are
these, save that it lets localisation and classification errors compete for an object even where only one of the two is
mended, and that it sorts detections on crowds too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from defeat_cli.errors import DataError

Id = int | str
ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1  # t_f, t_b
MAX_DETECTIONS = 100  # counted per image and class, as COCO does
RECALLS = np.linspace(0, 1, 101)
EQUAL_RECALLS = tuple(percent / 100 for percent in range(5, 100, 5))
"""At which detectors are compared by their background false positives: a score means another thing to each of them."""


@dataclass(frozen=True)
class ErrorReport:
    """Fractions are 0-1.

    ap50: pycocotools' AP50.
    types: for each of ERROR_TYPES its `count`, and `dap`, the AP50 that it costs.
    special: `dap` of all `false_positives` and of all `false_negatives`, whatever their type.
    background_false_positives: `count` of background errors at or above `score`, and their number `per_image`.
    background_at_recall: the same, for each of EQUAL_RECALLS that is reached, at the highest `score` from which on a
        share `recall` of all objects is found.
    """

    ap50: float
    types: dict[str, dict[str, float]]
    special: dict[str, dict[str, float]]
    background_false_positives: dict[str, float]
    background_at_recall: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Objects:
    """Ground truth as arrays, one entry an object, in the order of the annotations."""

    image_index: dict[Id, int]
    class_index: dict[Id, int]
    image: NDArray
    label: NDArray
    box: NDArray
    crowd: NDArray


@dataclass(frozen=True)
class _Detections:
    """Detections as arrays, highest score first; `position` counts within an image and class."""

    image: NDArray
    label: NDArray
    box: NDArray
    score: NDArray
    position: NDArray


@dataclass(frozen=True)
class _Pairs:
    """A detection and an object of one image that overlap."""

    detection: NDArray
    object: NDArray
    iou: NDArray

    def __getitem__(self, chosen: NDArray) -> _Pairs:
        return _Pairs(self.detection[chosen], self.object[chosen], self.iou[chosen])


@dataclass(frozen=True)
class _Findings:
    """What became of D detections and of the objects.

    right: [D] bool, true positives.
    errors: for each type but `missed` [D] bool. A detection that is neither right nor an error is ignored.
    mended: for `localisation` and `classification` the detections that become true positives, and the labels they get.
    missed: one bool an object.
    """

    right: NDArray
    errors: dict[str, NDArray]
    mended: dict[str, tuple[NDArray, NDArray]]
    missed: NDArray


def error_report(detections: list[dict[str, Any]], ground_truth: Any, score: float = 0.3) -> ErrorReport:
    """The errors of a set of detections, by type, and what each type costs.

    Args:
        detections: COCO results: `image_id`, `category_id`, `bbox` [x, y, width, height] in pixels, `score`.
        ground_truth: pycocotools `COCO`, or the same as a dict: `images`, `annotations`, `categories`.
        score: background false positives are counted from this score on.

    Raises:
        DataError: no object to find, or detections of an image or category that the ground truth does not know.
    """
    objects = _read_objects(ground_truth)
    found = _read_detections(detections, objects)
    findings = _sorted_out(found, objects)
    ap50, costs = _costs(findings, found.label, objects)

    def background_from(score: float) -> dict[str, float]:
        count = int((findings.errors["background"] & (found.score >= score)).sum())
        return {"score": score, "count": count, "per_image": count / len(objects.image_index)}

    counts = {name: int(error.sum()) for name, error in {**findings.errors, "missed": findings.missed}.items()}
    return ErrorReport(
        ap50=ap50,
        types={name: {"count": counts[name], "dap": costs[name]} for name in ERROR_TYPES},
        special={name: {"dap": costs[name]} for name in ("false_positives", "false_negatives")},
        background_false_positives=background_from(score),
        background_at_recall=[
            {"recall": recall, **background_from(reached)}
            for recall, reached in _scores_at_recalls(found, findings, objects)
        ],
    )


def _scores_at_recalls(found: _Detections, findings: _Findings, objects: _Objects) -> Iterator[tuple[float, float]]:
    """Each recall that is reached, over all classes and images, and the highest score from which on it is."""
    right = found.score[findings.right]  # highest first
    asked_for = int((~objects.crowd).sum())
    for recall in EQUAL_RECALLS:
        needed = math.ceil(recall * asked_for - 1e-9)
        if needed <= len(right):
            yield recall, float(right[needed - 1])


def _sorted_out(found: _Detections, objects: _Objects) -> _Findings:
    """Each detection right, ignored or one kind of error; each object taken, pointed at or missed."""
    pairs = _overlapping(found, objects)
    same_class = found.label[pairs.detection] == objects.label[pairs.object]
    on_crowd = objects.crowd[pairs.object]
    enough = pairs.iou >= FOREGROUND_IOU

    taken_by = _match(pairs[same_class & ~on_crowd & enough], found.position, len(objects.label))
    right = np.zeros(len(found.score), bool)
    right[taken_by[taken_by >= 0]] = True
    on_own_crowd = np.zeros_like(right)
    on_own_crowd[pairs.detection[same_class & on_crowd & enough]] = True

    own_iou, own_object = _best(pairs[same_class & ~on_crowd], len(right))
    other_iou, other_object = _best(pairs[~same_class & ~on_crowd], len(right))
    rules = {
        "localisation": (own_iou >= BACKGROUND_IOU) & (own_iou < FOREGROUND_IOU),
        "classification": other_iou >= FOREGROUND_IOU,
        "duplicate": own_iou >= FOREGROUND_IOU,
        "background": np.maximum(own_iou, other_iou) < BACKGROUND_IOU,
        "both": np.ones_like(right),
    }
    errors, rest = {}, ~right & ~on_own_crowd
    for name, applies in rules.items():
        errors[name] = rest & applies
        rest = rest & ~applies

    missed = (taken_by < 0) & ~objects.crowd
    mended = {}
    for name, pointed_at in (("localisation", own_object), ("classification", other_object)):
        detection = _mendable(errors[name], pointed_at, taken_by)
        mended[name] = (detection, objects.label[pointed_at[detection]])
        missed[pointed_at[detection]] = False
    return _Findings(right, errors, mended, missed)


def _costs(findings: _Findings, label: NDArray, objects: _Objects) -> tuple[float, dict[str, float]]:
    """AP50, and what each type of error and the two special ones take from it."""
    right = findings.right
    wanted = np.bincount(objects.label[~objects.crowd], minlength=len(objects.class_index))
    missed = np.bincount(objects.label[findings.missed], minlength=len(wanted))
    taken = np.bincount(label[right], minlength=len(wanted))
    wrong = np.any(list(findings.errors.values()), axis=0)
    counted = right | wrong

    ap50 = _mean_ap(label[counted], right[counted], wanted)
    mended = {
        "missed": _mean_ap(label[counted], right[counted], wanted - missed),
        "false_positives": _mean_ap(label[right], right[right], wanted),
        "false_negatives": _mean_ap(label[counted], right[counted], taken),
    }
    for name, error in findings.errors.items():
        hit, new_label = right.copy(), label.copy()
        if name in findings.mended:
            detection, true_label = findings.mended[name]
            hit[detection], new_label[detection] = True, true_label
        kept = hit | (wrong & ~error)
        mended[name] = _mean_ap(new_label[kept], hit[kept], wanted)
    return ap50, {name: ap - ap50 for name, ap in mended.items()}


def _read_objects(ground_truth: Any) -> _Objects:
    content = ground_truth if isinstance(ground_truth, dict) else ground_truth.dataset
    annotations = content["annotations"]
    image_index = _numbered([image["id"] for image in content["images"]])
    class_index = _numbered([category["id"] for category in content["categories"]])
    crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], dtype=bool)
    if crowd.all():
        raise DataError("the ground truth holds no object, so detections cannot be scored against it")
    return _Objects(
        image_index=image_index,
        class_index=class_index,
        image=_indices([annotation["image_id"] for annotation in annotations], image_index, "annotation", "image"),
        label=_indices(
            [annotation["category_id"] for annotation in annotations], class_index, "annotation", "category"
        ),
        box=np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64),
        crowd=crowd,
    )


def _read_detections(detections: list[dict[str, Any]], objects: _Objects) -> _Detections:
    image = _indices([d["image_id"] for d in detections], objects.image_index, "detection", "image")
    label = _indices([d["category_id"] for d in detections], objects.class_index, "detection", "category")
    box = np.array([d["bbox"] for d in detections], dtype=np.float64).reshape(-1, 4)
    score = np.array([d["score"] for d in detections], dtype=np.float64)
    # COCO goes through images in the order of their ids, and keeps the given order among equal scores.
    by_image = np.argsort(image, kind="stable")
    order = by_image[np.argsort(-score[by_image], kind="stable")]
    image, label, box, score = image[order], label[order], box[order], score[order]

    group = image * len(objects.class_index) + label
    grouped = np.argsort(group, kind="stable")
    _, first, sizes = np.unique(group[grouped], return_index=True, return_counts=True)
    position = np.empty_like(group)
    position[grouped] = np.arange(len(group)) - np.repeat(first, sizes)
    kept = position < MAX_DETECTIONS
    return _Detections(image[kept], label[kept], box[kept], score[kept], position[kept])


def _numbered(ids: list[Id]) -> dict[Id, int]:
    """Id -> index, in the order of the ids: numbers, then strings."""
    return {key: i for i, key in enumerate(sorted(set(ids), key=lambda key: (isinstance(key, str), key)))}


def _indices(ids: list[Id], index: dict[Id, int], what: str, of: str) -> NDArray:
    """[N] index of each id."""
    indices = np.array([index.get(key, -1) for key in ids], dtype=np.int64)
    if (indices < 0).any():
        unknown = ids[int(np.argmin(indices))]
        raise DataError(f"{(indices < 0).sum()} {what}(s) of {of} {unknown!r}, which the ground truth does not list")
    return indices


def _overlapping(found: _Detections, objects: _Objects) -> _Pairs:
    """Pairs within an image whose IoU reaches t_b; on a crowd it is intersection over detection."""
    blocks = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    images = len(objects.image_index)
    for rows, columns in zip(_by_image(found.image, images), _by_image(objects.image, images), strict=True):
        if not len(rows) or not len(columns):
            continue
        iou = coco_mask.iou(found.box[rows], objects.box[columns], objects.crowd[columns].astype(np.uint8))
        row, column = np.nonzero(iou >= BACKGROUND_IOU)
        blocks.append((rows[row], columns[column], iou[row, column]))
    return _Pairs(*map(np.concatenate, zip(*blocks, strict=True)))


def _by_image(image: NDArray, images: int) -> Iterator[NDArray]:
    """The entries of each image in turn."""
    order = np.argsort(image, kind="stable")
    bounds = np.searchsorted(image[order], np.arange(images + 1))
    return (order[start:end] for start, end in pairwise(bounds))


def _match(candidates: _Pairs, position: NDArray, objects: int) -> NDArray:
    """COCO's greedy matching of all images and classes at once.

    In each image and class the detections choose in the order of their scores, each the free object that it overlaps
    most. So the first of every image and class choose together, then the second, and so on.

    Args:
        candidates: pairs of one class that overlap enough.
        position: [D] place of each detection within its image and class, 0 for the highest score.

    Returns:
        [objects] the detection that took each object, -1 where none did.
    """
    taken_by = np.full(objects, -1)
    turn = position[candidates.detection]
    # The last candidate of a detection is its choice; among equal IoUs COCO takes the later object.
    order = np.lexsort((candidates.object, candidates.iou, candidates.detection, turn))
    detection, chosen = candidates.detection[order], candidates.object[order]
    turns = np.searchsorted(turn[order], np.arange(turn.max(initial=-1) + 2))
    for start, end in pairwise(turns):
        free = taken_by[chosen[start:end]] < 0
        who, what = detection[start:end][free], chosen[start:end][free]
        last = np.ones(len(who), bool)
        last[:-1] = who[1:] != who[:-1]
        taken_by[what[last]] = who[last]
    return taken_by


def _best(pairs: _Pairs, detections: int) -> tuple[NDArray, NDArray]:
    """[D] highest IoU of each detection among the pairs (0 where it is in none), [D] the object it is with (-1)."""
    iou, best = np.zeros(detections), np.full(detections, -1)
    order = np.argsort(pairs.iou, kind="stable")
    # Where an index occurs more than once numpy keeps the last value assigned.
    iou[pairs.detection[order]] = pairs.iou[order]
    best[pairs.detection[order]] = pairs.object[order]
    return iou, best


def _mendable(error: NDArray, pointed_at: NDArray, taken_by: NDArray) -> NDArray:
    """The detections that an oracle turns into true positives: for each free object the highest score."""
    candidates = np.flatnonzero(error)
    candidates = candidates[taken_by[pointed_at[candidates]] < 0]
    _, first = np.unique(pointed_at[candidates], return_index=True)
    return candidates[first]


def _mean_ap(label: NDArray, hit: NDArray, wanted: NDArray) -> float:
    """Mean over classes of COCO's 101-point average precision.

    Args:
        label: [D] class index of each detection, highest score first.
        hit: [D] bool, true positives.
        wanted: [K] objects of each class; classes with none are left out of the mean.
    """
    order = np.argsort(label, kind="stable")
    hit = hit[order]
    bounds = np.searchsorted(label[order], np.arange(len(wanted) + 1))
    averages = []
    for k in np.flatnonzero(wanted):
        hits = np.cumsum(hit[bounds[k] : bounds[k + 1]])
        precision = hits / np.arange(1, len(hits) + 1)
        best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(hits / wanted[k], RECALLS)
        averages.append(best_from_here[reached[reached < len(hits)]].sum() / len(RECALLS))
    return float(np.mean(averages)) if averages else 1.0
