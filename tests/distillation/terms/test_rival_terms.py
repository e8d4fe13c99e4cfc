"""Every rival on every pair that can have it: what it trains, saves and refuses."""

import copy

import pytest
import torch
from tiny import batch as make_batch
from tiny import build, distil

from defeat_cli.detectors.contract import FeatureDetector
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.losses import frs_class_loss
from defeat_cli.distillation.masks import valid_masks
from defeat_cli.distillation.terms import TERMS
from defeat_cli.distillation.terms.scores import teacher_scores
from defeat_cli.errors import TermError

batch = pytest.fixture(make_batch)
NECK = ["pkd", "cwd", "fgd", "mgd", "frs", "fitnets"]
PAIRS = [
    ("faster_rcnn", "faster_rcnn"), ("retinanet", "retinanet"), ("fcos", "fcos"), ("faster_rcnn", "retinanet"),
    ("retinanet", "faster_rcnn"), ("retinanet", "fcos"), ("faster_rcnn", "fcos"),
]  # fmt: skip
WIDER = {"faster_rcnn": 12, "retinanet": 24, "fcos": 96}
LOSSES = {
    "pkd": {"pkd"},
    "cwd": {"cwd"},
    "mgd": {"mgd"},
    "fitnets": {"fitnets"},
    "frs": {"frs_features"},
    "fgd": {"fgd_fg", "fgd_bg", "fgd_attention", "fgd_relation"},
    "dist": {"dist_regions", "dist_classes"},
    "crosskd": {"crosskd_classes", "crosskd_boxes"},
}


DENSE = [*NECK, "crosskd", "dist"]
"""What a pair of RetinaNets can have."""


def applicable(teacher, student):
    same = teacher == student
    return NECK + ["dist"] * same + ["crosskd"] * ("faster_rcnn" not in (teacher, student))


CASES = [(*pair, name) for pair in PAIRS for name in applicable(*pair)]


@pytest.mark.parametrize(("of_teacher", "of_student", "name"), CASES)
def test_a_step_trains_the_student_and_the_term(of_teacher, of_student, name, batch):
    # The teacher is wider where the family allows it: adapters are needed.
    student, teacher = build(of_student), build(of_teacher, seed=1, fpn_channels=WIDER[of_teacher])
    before = copy.deepcopy(teacher.state_dict())
    distiller = distil(student, teacher, [name])
    losses = distiller(*batch)
    distilled = {key: value for key, value in losses.weighted.items() if key.startswith(name)}
    expected = LOSSES[name] | ({"frs_classes"} if name == "frs" and of_teacher == of_student else set())
    assert set(distilled) == expected
    assert all(value.isfinite() and value > 0 for value in distilled.values())
    sum(distilled.values()).backward()
    for key, parameter in distiller.terms.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert any(p.grad is not None and p.grad.any() for p in student.model.backbone.fpn.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_state_dict_brings_terms_back(batch):
    student, teacher = build("retinanet"), build("retinanet", seed=1, fpn_channels=24)
    distiller = distil(student, teacher, DENSE)
    # Every parameter has to count, and layers that start at 0 hide those before them.
    for parameter in distiller.terms.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.manual_seed(1)
    expected = distiller(*batch).raw
    other = distil(student, teacher, DENSE)
    other.terms.load_state_dict(copy.deepcopy(distiller.terms.state_dict()))
    torch.manual_seed(1)
    assert other(*batch).raw == expected


def test_the_teacher_may_see_images_at_its_own_size(batch):
    student, teacher = build("retinanet"), build("retinanet", seed=1, short_side=96)
    torch.manual_seed(0)
    terms = {name: TERMS[name](student, teacher) for name in [*NECK, "crosskd"] if name != "frs"}
    terms["frs"] = TERMS["frs"](student, teacher, class_weight=0.0)
    losses = Distiller(student, teacher, terms, own_size=True).train()(*batch).weighted
    assert "frs_classes" not in losses
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("name", ["head", "dist", "frs"])
def test_anchors_of_images_of_other_sizes_are_not_compared(name):
    student, teacher = build("retinanet"), build("retinanet", seed=1, short_side=96)
    with pytest.raises(
        TermError, match=f"teacher.size: own: distillation.{name} cannot have it: .* use teacher.size: s"
    ):
        distil(student, teacher, [name], own_size=True)


def test_terms_are_computed_in_full_precision_under_autocast(batch):
    student, teacher = build("retinanet"), build("retinanet", seed=1, fpn_channels=24)
    with torch.autocast("cpu", torch.bfloat16):
        losses = distil(student, teacher, DENSE)(*batch)
    assert {loss.dtype for loss in losses.weighted.values()} == {torch.float32}


def test_a_batch_without_any_box(batch):
    images, targets = batch
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    losses = distil(build("retinanet"), build("retinanet", seed=1), DENSE)(images, nothing)
    assert all(loss.isfinite() for loss in losses.weighted.values())
    assert losses.raw["fgd_fg"] == 0
    assert losses.raw["fgd_bg"] > 0


def features_only(channels=8):
    return FeatureDetector(
        torch.nn.Conv2d(3, channels, 8, stride=8), ["a"], lambda model, batch: [model(batch.pixels)], lambda *_: {}
    )


def test_any_module_with_features_can_learn_and_teach(batch):
    losses = distil(features_only(), features_only(), ["pkd", "cwd", "fgd", "mgd", "fitnets"])(*batch)
    assert all(loss.isfinite() for loss in losses.weighted.values())


@pytest.mark.parametrize(
    ("name", "student", "teacher", "reason"),
    [
        ("dist", "faster_rcnn", "retinanet", "there are no regions that both heads take"),
        ("dist", "fcos", "retinanet", "one-stage detectors of different kinds"),
        ("crosskd", "faster_rcnn", "retinanet", "the student has no class and box towers"),
        ("crosskd", "retinanet", "faster_rcnn", "the teacher has no class and box towers"),
        ("ld", "retinanet", "retinanet", "distribution"),
        ("frs", "retinanet", None, "the teacher does not score the cells"),
        ("neck", "retinanet", None, "mask: teacher: the teacher does not score the cells"),
        ("dist", "retinanet", None, "the teacher does not classify regions"),
        ("crosskd", None, "retinanet", "the student has no class and box towers"),
    ],
)
def test_what_a_pair_cannot_have_is_refused_with_the_reason(name, student, teacher, reason):
    pair = [features_only() if family is None else build(family) for family in (student, teacher)]
    settings = {"mask": "teacher"} if name == "neck" else {}
    assert reason in TERMS[name].obstacle(*pair, **settings)
    with pytest.raises(TermError, match=reason):
        TERMS[name](*pair, **settings)


def test_dist_and_frs_compare_the_classes_that_both_know(batch):
    student, teacher = build("retinanet"), build("retinanet", seed=1, classes=["x", "B", "a", "y"])
    distiller = distil(student, teacher, ["dist", "frs"])
    assert distiller.terms["dist"].notes == ["head distillation runs over 2 shared classes (a, b)"]
    losses = distiller(*batch).raw
    ours, theirs = distiller.views(*batch)
    shapes = [feature.shape[-2:] for feature in ours.features]
    expected = 0.0
    for s, t, score, valid in zip(
        ours.cell_logits,
        theirs.cell_logits,
        teacher_scores(ours, theirs, distiller.terms["frs"].pairs),
        valid_masks(ours.batch.valid, shapes, student.strides),
        strict=True,
    ):
        shared = s[:, :, [0, 1]].flatten(1, 2), t[:, :, [2, 1]].flatten(1, 2)
        expected += frs_class_loss(*shared, score * valid).item()
    assert distiller.terms["frs"](ours, theirs)["classes"].value.item() == pytest.approx(expected, rel=1e-5)
    # With the shared classes in the same places the losses are the same: only they are compared.
    head = teacher.model.head.classification_head
    logits = torch.nn.Conv2d(head.cls_logits.in_channels, 6 * 3, 3, padding=1)
    for part in ("weight", "bias"):
        kept = getattr(head.cls_logits, part).detach().unflatten(0, (6, 5))[:, [0, 3, 2]]
        getattr(logits, part).data = kept.flatten(0, 1).clone()
    head.cls_logits, head.num_classes = logits, 3
    teacher.classes = ["a", "b"]
    again = distil(student, teacher, ["dist"])(*batch).raw
    for name in LOSSES["dist"]:
        torch.testing.assert_close(again[name], losses[name])


def test_frs_says_when_it_compares_features_only():
    student, teacher = build("fcos"), build("retinanet", seed=1)
    assert "frs compares features only" in TERMS["frs"](student, teacher).notes[-1]
    assert not any("frs" in note for note in TERMS["frs"](student, teacher, class_weight=0.0).notes)


PUBLISHED = {
    "pkd": ({"weight": 6.0}, {"weight": 10.0}),
    "cwd": ({"weight": 10.0, "temperature": 1.0}, {"weight": 10.0, "temperature": 1.0}),
    "fgd": (
        {"temperature": 0.5, "alpha_fg": 5e-5, "alpha_bg": 2.5e-5, "attention": 5e-5, "relation": 5e-7},
        {"temperature": 0.5, "alpha_fg": 1e-3, "alpha_bg": 5e-4, "attention": 5e-4, "relation": 5e-6},
    ),
    "mgd": ({"weight": 5e-7, "hidden": 0.45}, {"weight": 2e-5, "hidden": 0.65}),
    "frs": ({"weight": 0.002, "class_weight": 0.1}, {"weight": 0.005, "class_weight": 0.02}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_go_by_the_students_kind(name):
    two, one = build("faster_rcnn"), build("retinanet")
    for student, teacher, published in ((two, one, PUBLISHED[name][0]), (one, two, PUBLISHED[name][1])):
        settings = TERMS[name](student, teacher).settings
        assert {key: getattr(settings, key) for key in published} == published
        # What is said comes first.
        given = TERMS[name](student, teacher, **dict.fromkeys(published, 0.25)).settings
        assert {key: getattr(given, key) for key in published} == dict.fromkeys(published, 0.25)


def test_levels_are_those_of_the_publications():
    two, one = build("faster_rcnn"), build("retinanet")
    levels = {
        (name, kind): [term.names[s] for s, _ in term.pairs]
        for name in NECK
        for kind, detector in (("two-stage", two), ("one-stage", one))
        for term in [TERMS[name](detector, detector)]
    }
    for name in NECK:
        assert levels[name, "two-stage"] == ["P2", "P3", "P4", "P5"] + ["P6"] * (name in ("cwd", "frs", "fitnets"))
        assert levels[name, "one-stage"] == ["P3", "P4", "P5", "P6"] + ["P7"] * (name != "pkd")
    # What a method leaves out by itself is no news to the user.
    assert TERMS["pkd"](one, one).notes == []
