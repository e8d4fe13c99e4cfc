"""Levels pair by stride, classes by name."""

from __future__ import annotations

import pytest

from defeat_cli.distillation.pairing import match_classes, match_levels
from defeat_cli.errors import DefeatError

VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ([4, 8, 16], [4, 8, 16], [(0, 0), (1, 1), (2, 2)]),
        ([8, 16, 32], [4, 8, 16], [(0, 1), (1, 2)]),
        ([32, 32, 64], [16, 32, 32, 64], [(0, 1), (1, 2), (2, 3)]),
        ([32, 32], [32], [(0, 0)]),
        ([4], [8], []),
        ([], [8], []),
    ],
)
def test_levels_pair_by_stride(student, teacher, pairs):
    assert match_levels(student, teacher) == pairs


def test_classes_pair_by_name_wherever_they_stand():
    assert match_classes(["cat", "dog", "yak"], ["dog", "emu", "cat"]) == [(0, 2), (1, 0)]


def test_case_and_spaces_do_not_matter():
    assert match_classes(["Traffic Light", "stop_sign"], ["stop sign", "traffic-light"]) == [(0, 1), (1, 0)]


def test_all_voc_classes_are_found_among_coco_s():
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    pairs = match_classes(VOC, coco)
    named = {VOC[s]: coco[t] for s, t in pairs}
    assert len(named) == 20
    renamed = {voc: name for voc, name in named.items() if voc != name}
    assert renamed == {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "motorbike": "motorcycle",
        "pottedplant": "potted plant",
        "sofa": "couch",
        "tvmonitor": "tv",
    }


def test_synonyms_work_in_both_directions():
    assert match_classes(["couch", "airplane"], ["aeroplane", "sofa"]) == [(0, 1), (1, 0)]


def test_not_a_class_never_matches():
    assert match_classes(["N/A", "cat", "n/a"], ["N/A", "N/A", "cat"]) == [(1, 2)]


def test_the_exact_name_comes_first_and_each_class_pairs_once():
    assert match_classes(["sofa", "couch"], ["couch", "sofa"]) == [(0, 1), (1, 0)]
    assert match_classes(["couch", "sofa"], ["sofa"]) == [(1, 0)]
    assert match_classes(["Cat"], ["CAT", "Cat"]) == [(0, 1)]
    assert match_classes(["Cat", "CAT"], ["cat"]) == [(0, 0)]


def test_names_pair_what_is_called_differently_and_come_first():
    assert match_classes(["rbc", "wbc"], ["wbc", "red cell"], {"red cell": "rbc"}) == [(0, 1), (1, 0)]
    assert match_classes(["a", "b"], ["a", "b"], {"a": "b"}) == [(1, 0)]
    assert match_classes(["dining table"], ["desk"], {"Desk": "diningtable"}) == [(0, 0)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"persn": "human"}, r"class_map: persn: human: the teacher has no class 'persn' \(did you mean person\?\)"),
        ({"person": "humen"}, r"class_map: person: humen: the student has no class 'humen' \(did you mean human\?\)"),
        ({"zzz": "human"}, r"the teacher has no class 'zzz'; it has person, car$"),
        ({"N/A": "human"}, r"the teacher has no class 'N/A'"),
        ({"person": "human", "car": "human"}, r"car: human: the student's class 'human' is mapped twice"),
        ({"person": "human", "Person": "auto"}, r"Person: auto: the teacher's class 'Person' is mapped twice"),
    ],
)
def test_names_that_cannot_be_used(names, message):
    with pytest.raises(DefeatError, match=message):
        match_classes(["human", "auto"], ["person", "N/A", "car"], names)
