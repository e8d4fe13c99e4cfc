from __future__ import annotations

import pytest

from defeat_cli.ablation.choice import SweepPoint, choose
from defeat_cli.config.schema import Recipe
from defeat_cli.config.variants import VARIANTS, Variant
from defeat_cli.errors import RecipeError

KEY = next(key for key in VARIANTS["bg-only"].overrides if key.endswith("alpha_fg")).replace("alpha_fg", "alpha_bg")
"""Where the recipe keeps the neck's background weight."""


def chosen(*names, known=VARIANTS):
    return choose(names, known, {}, Recipe())[0]


def test_none_comes_first_and_a_slash_means_both():
    assert list(chosen("neck", "fg-only/bg-only")) == ["none", "neck", "fg-only", "bg-only"]
    assert list(chosen("neck", "none")) == ["none", "neck"]


def test_a_group_adds_its_variants_to_those_named():
    groups = {"all-some": ("full", "neck")}
    variants, optional = choose(["neck", "all-some"], VARIANTS, groups, Recipe())
    assert (list(variants), optional) == (["none", "neck", "full"], {"full"})


def test_a_sweep_makes_a_variant_of_each_value():
    points = list(chosen("neck:alpha_bg=1,4,1e-3").items())[1:]
    assert [name for name, _ in points] == ["neck:alpha_bg=1", "neck:alpha_bg=4", "neck:alpha_bg=0.001"]
    point = points[1][1]
    assert isinstance(point, SweepPoint)
    assert (point.base, point.settings) == ("neck", {KEY: 4})
    assert point.overrides == {**VARIANTS["neck"].overrides, KEY: 4}


def test_a_sweep_has_one_name_however_its_key_is_written():
    assert list(chosen(f"neck:{KEY}=4")) == list(chosen("neck:alpha_bg=4"))


def test_any_recipe_key_and_any_value_can_be_swept():
    weights = "torchvision:fasterrcnn_resnet50_fpn,runs/a/best.pt"
    names = list(chosen(f"neck:teacher.checkpoint={weights}", "none:student.anchor_sizes=[[8]],[[16], [32]]"))
    assert names == [
        "none",
        "neck:teacher.checkpoint=torchvision:fasterrcnn_resnet50_fpn",
        "neck:teacher.checkpoint=runs/a/best.pt",
        "none:student.anchor_sizes=[[8]]",
        "none:student.anchor_sizes=[[16], [32]]",
    ]


def test_several_settings_make_a_grid_and_several_variants_a_sweep_each():
    assert list(chosen("neck:alpha_fg=1,2:alpha_bg=3,4"))[1:] == [
        "neck:alpha_fg=1:alpha_bg=3", "neck:alpha_fg=1:alpha_bg=4",
        "neck:alpha_fg=2:alpha_bg=3", "neck:alpha_fg=2:alpha_bg=4",
    ]  # fmt: skip
    assert list(chosen("neck/gaussian:alpha_fg=1")) == ["none", "neck:alpha_fg=1", "gaussian:alpha_fg=1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fg-onyl"], "did you mean fg-only"),
        (["neck/fg-onyl"], "did you mean fg-only"),
        (["neck", "neck"], "variant neck is named twice"),
        (["neck:alpha_bg=1", "neck:alpha_bg=1,4"], "variant neck:alpha_bg=1 is named twice"),
        (["neck:alpha_bg=1,4,1.0"], "alpha_bg=1.0 is named twice"),
        (["neck:alphabg=1,4"], r"neck:alphabg: variant neck has no such setting \(did you mean alpha_bg\?\)"),
        (["neck:optimizer.rl=1"], r"did you mean optimizer.lr\?"),
        (["neck:alpha_bg=1,2:neck.alpha_bg=3"], "name each setting once"),
        (["none:alpha_bg=1"], r"variant none has no such setting\. Give a full recipe key"),
        (["neck:beta_fg=1"], r"one of its terms' settings \(.*neck\.alpha_bg.*\)"),
        (["neck:warmup_steps=1"], "write the one that you mean in full"),
        (["neck:alpha_bg="], "give the values of alpha_bg"),
        (["neck:alpha_bg=[1"], "no YAML values separated by commas"),
        (["neck:alpha_bg"], "no variant 'neck:alpha_bg'"),
    ],
)
def test_what_means_nothing_is_refused(names, message):
    with pytest.raises(RecipeError, match=message):
        chosen(*names)


def test_a_setting_that_two_terms_have_must_be_written_in_full(monkeypatch):
    keys = ["distillation.neck.weight", "distillation.head.weight", "optimizer.lr"]
    monkeypatch.setattr("defeat_cli.ablation.choice._settings", lambda *_: keys)
    with pytest.raises(RecipeError, match=r"may be distillation\.neck\.weight or distillation\.head\.weight"):
        chosen("neck:weight=1,2")
    assert list(chosen("neck:head.weight=1"))[1:] == ["neck:distillation.head.weight=1"]


def test_variants_of_a_file_may_have_any_name():
    known = {**VARIANTS, "a/b:c=1": Variant("mine")}
    assert list(chosen("a/b:c=1", known=known)) == ["none", "a/b:c=1"]
