"""The step's terms: each variant has exactly those it names, decoupled parts add up, the teacher stays as it is."""

import copy

import pytest
import torch
from tiny import batch as make_batch
from tiny import build

from defeat_cli import building
from defeat_cli.config import schema as recipes
from defeat_cli.config.variants import VARIANTS
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.losses import imitation_loss, region_kl
from defeat_cli.distillation.masks import box_masks, valid_masks
from defeat_cli.distillation.terms import TERMS as REGISTERED
from defeat_cli.engine.step import seed_step
from defeat_cli.errors import TermError

batch = pytest.fixture(make_batch)
NECK, HEAD, BACKBONE = {"neck_fg", "neck_bg"}, {"head_fg", "head_bg"}, {"backbone_fg", "backbone_bg"}
TERMS = {
    "none": set(),
    "full": {"neck_fg"},
    "fg-only": {"neck_fg"},
    "bg-only": {"neck_bg"},
    "neck": NECK,
    "gaussian": {"neck_fg"},
    "fine-grained": {"neck_fg"},
    "head-all": {"head_all"},
    "head-fg": {"head_fg"},
    "head-bg": {"head_bg"},
    "head": HEAD,
    "defeat": NECK | HEAD,
    "defeat+backbone": NECK | HEAD | BACKBONE,
    "pkd": {"pkd"},
    "cwd": {"cwd"},
    "fgd": {"fgd_fg", "fgd_bg", "fgd_attention", "fgd_relation"},
    "mgd": {"mgd"},
    "frs": {"frs_features", "frs_classes"},
    "fitnets": {"fitnets"},
    "dist": {"dist_regions", "dist_classes"},
    "defeat+pkd": NECK | HEAD | {"pkd"},
    "crosskd": None,
    "crosskd+pkd": None,
}
"""Losses by variant; None where a two-stage pair cannot have it."""


@pytest.fixture
def pair():
    return build(), build(seed=1, fpn_channels=12)


def settings(variant):
    return recipes.load(None, VARIANTS[variant].overrides).distillation


def terms_of(variant, pair, batch, warm=1.0):
    torch.manual_seed(0)
    distiller = distilled(pair, settings(variant)).train()
    seed_step(0, 0)
    return distiller(*batch, warm)


def distilled(pair, distillation):
    if not distillation.terms:
        return Distiller(pair[0])
    return Distiller(*pair, building.build_terms(distillation.terms, *pair)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_the_terms_it_names_and_no_other(variant, pair, batch):
    if TERMS[variant] is None:
        with pytest.raises(TermError, match="crosskd is for pairs of one-stage detectors"):
            terms_of(variant, pair, batch)
        return
    terms = terms_of(variant, pair, batch)
    distilled = {name: value.item() for name, value in terms.weighted.items() if not name.startswith("loss_")}
    assert set(distilled) == TERMS[variant]
    assert all(value > 0 for value in distilled.values())
    # The head loss on foreground and on background is logged in every run with a head term.
    assert (set(terms.raw) >= HEAD) == variant.startswith(("head", "defeat"))


def test_fg_only_and_bg_only_add_up_to_neck(pair, batch):
    apart = {**terms_of("fg-only", pair, batch).weighted, **terms_of("bg-only", pair, batch).weighted}
    together = terms_of("neck", pair, batch).weighted
    for name in NECK:
        assert torch.equal(apart[name], together[name])


def test_variants_draw_the_same_training_samples(pair, batch):
    plain = terms_of("none", pair, batch).weighted
    for variant in ("neck", "head", "defeat+backbone"):
        terms = terms_of(variant, pair, batch).weighted
        assert all(torch.equal(terms[name], value) for name, value in plain.items())


def test_terms_equal_the_pure_functions_on_the_detectors_own_outputs(pair, batch):
    student, teacher = pair
    torch.manual_seed(0)
    neck = REGISTERED["neck"](student, teacher, alpha_fg=3.0, alpha_bg=5.0)
    head = REGISTERED["head"](student, teacher, beta_fg=0.5, beta_bg=0.25, temperature_bg=2.0)
    distiller = Distiller(student, teacher, {"neck": neck, "head": head}).train()
    seed_step(0, 7)
    terms = distiller(*batch, 0.5).weighted

    seed_step(0, 7)
    prepared = student.prepare(*batch)
    features = student.features(prepared)
    student.losses(features, prepared)  # draws the student's samples first, as the step does
    theirs = teacher.features(prepared)
    regions = teacher.regions(theirs, prepared)
    shapes = [tuple(feature.shape[-2:]) for feature in features]
    masks = box_masks([t["boxes"] for t in prepared.targets], shapes, student.strides)
    valid = valid_masks(prepared.valid, shapes, student.strides)
    levels = [
        imitation_loss(adapter(s), t, mask, 3.0, 5.0, valid=ok)
        for adapter, s, t, mask, ok in zip(neck.adapters, features, theirs, masks, valid, strict=True)
    ]
    for name, values in zip(("neck_fg", "neck_bg"), zip(*levels, strict=True), strict=True):
        torch.testing.assert_close(terms[name], 0.5 * torch.stack(values).mean())
    heads = region_kl(
        student.classify(features, regions), teacher.classify(theirs, regions), torch.cat(regions.labels) > 0,
        0.5, 0.25, 1.0, 2.0,
    )  # fmt: skip
    for name, value in zip(("head_fg", "head_bg"), heads, strict=True):
        torch.testing.assert_close(terms[name], 0.5 * value)


def test_the_teacher_is_frozen_and_stays_in_eval_mode(pair, batch):
    teacher = pair[1]
    before = copy.deepcopy(teacher.state_dict())
    distiller = distilled(pair, settings("neck")).train()
    sum(distiller(*batch).weighted.values()).backward()
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(p.grad is not None for p in distiller.terms.parameters())


def test_warm_up_scales_distillation_and_leaves_detection(pair, batch):
    whole, half = (terms_of("defeat", pair, batch, warm).weighted for warm in (1.0, 0.5))
    for name, value in whole.items():
        torch.testing.assert_close(half[name], value if name.startswith("loss_") else 0.5 * value)


def test_shared_classes_only_reach_the_head(pair, batch):
    student, _ = pair
    teacher = build(seed=1, classes=["x", "B", "a", "y"])
    torch.manual_seed(0)
    terms, notes = building.build_terms(settings("head").terms, student, teacher)
    assert [note.text for note in notes] == ["head distillation runs over 2 shared classes (a, b)"]
    distiller = Distiller(student, teacher, terms).train()
    seed_step(0, 0)
    terms = distiller(*batch)

    seed_step(0, 0)
    prepared = student.prepare(*batch)
    features = student.features(prepared)
    student.losses(features, prepared)
    theirs = teacher.features(prepared)
    regions = teacher.regions(theirs, prepared)
    logits = student.classify(features, regions)[:, [0, 1, 2]]  # background, a, b
    teacher_logits = teacher.classify(theirs, regions)[:, [0, 3, 2]]
    fg, bg = region_kl(logits, teacher_logits, torch.cat(regions.labels) > 0)
    torch.testing.assert_close(terms.raw["head_fg"], fg.detach())
    torch.testing.assert_close(terms.raw["head_bg"], bg.detach())


def test_no_shared_class_leaves_nothing_of_a_head_variant(pair):
    student, _ = pair
    with pytest.raises(TermError, match=r"nothing is left to distil .* share no class; distillation\.class_map"):
        building.build_terms(settings("head").terms, student, build(seed=1, classes=["x"]))
